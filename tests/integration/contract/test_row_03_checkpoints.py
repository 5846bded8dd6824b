"""Row 3: checkpoints load wherever they are asked for, with and without the callback."""

import pytest
import torch
from accelerators import cases
from contract_models import ContractModule, loader
from contract_runs import assert_equal_modules, fit, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_accel import enable_low_rank_loading, load_from_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")

PARAMETRIZED = pytest.mark.parametrize("entry", cases())
WEIGHTS_ONLY = pytest.mark.parametrize("weights_only", [False, True], ids=["complete", "weights-only"])


def fitted(entry, folder, *, weights_only=False):
    best = ModelCheckpoint(
        dirpath=folder, monitor="val/loss", filename="best", save_last=True, save_weights_only=weights_only
    )
    module, runner = fit(entry, folder, callbacks=[*entry.callbacks(), best])
    assert entry.acted(module)
    return module, runner, folder / "last.ckpt"


def loss_of(module, entry, runner, ckpt_path):
    torch.manual_seed(2)
    (result,) = runner.test(module, loader(entry.data()), ckpt_path=ckpt_path, verbose=False)
    return result["test/loss"]


@PARAMETRIZED
def test_same_trainer_tests_its_best_checkpoint(entry, tmp_path):
    module, runner, _ = fitted(entry, tmp_path)
    (validated,) = runner.validate(module, loader(entry.data()), ckpt_path="best", verbose=False)
    assert validated["val/loss"] == loss_of(module, entry, runner, "best")
    assert validated["val/loss"] == float(runner.checkpoint_callback.best_model_score)


@WEIGHTS_ONLY
@PARAMETRIZED
def test_new_trainer_with_the_callback_tests_a_checkpoint(entry, weights_only, tmp_path):
    module, runner, ckpt = fitted(entry, tmp_path, weights_only=weights_only)
    expected = loss_of(module, entry, runner, ckpt)
    fresh = ContractModule(entry.name)
    with_callback = trainer(tmp_path / "new", entry.callbacks(), strategy=entry.strategy())
    assert loss_of(fresh, entry, with_callback, ckpt) == expected
    assert_equal_modules(module, fresh)


@WEIGHTS_ONLY
@PARAMETRIZED
def test_new_trainer_without_the_callback_tests_a_checkpoint(entry, weights_only, tmp_path):
    module, runner, ckpt = fitted(entry, tmp_path, weights_only=weights_only)
    expected = loss_of(module, entry, runner, ckpt)
    fresh = enable_low_rank_loading(ContractModule(entry.name))
    assert loss_of(fresh, entry, trainer(tmp_path / "new", []), ckpt) == expected
    assert_equal_modules(module, fresh)


@WEIGHTS_ONLY
@PARAMETRIZED
def test_documented_helper_loads_a_checkpoint(entry, weights_only, tmp_path):
    module, _, ckpt = fitted(entry, tmp_path, weights_only=weights_only)
    module.trainer.strategy.load_model_state_dict(torch.load(ckpt))
    assert_equal_modules(module, load_from_checkpoint(ContractModule, ckpt))


@PARAMETRIZED
def test_run_goes_on_from_a_checkpoint_of_a_plain_run(entry, tmp_path):
    last = ModelCheckpoint(dirpath=tmp_path, filename="plain", save_last=False)
    fit(entry, tmp_path, callbacks=[last], max_epochs=2, strategy="auto")
    module, runner = fit(entry, tmp_path / "on", ckpt_path=tmp_path / "plain.ckpt")
    assert entry.acted(module)
    assert runner.global_step == 2 * 6 + (entry.epochs - 2) * 6
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
