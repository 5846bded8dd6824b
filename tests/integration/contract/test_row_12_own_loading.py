"""Row 12: what a module does to its own checkpoints, in `on_load_checkpoint`, holds wherever we load."""

import pytest
import torch
from accelerators import cases
from contract_models import ContractModule, loader
from contract_runs import assert_equal_modules, fit, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_accel import enable_low_rank_loading, load_from_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")


class Renaming(ContractModule):
    """Saves its network under another name."""

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k.replace("network.", "renamed.", 1): v for k, v in state.items()}

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k.replace("renamed.", "network.", 1): v for k, v in state.items()}


def fitted(entry, folder):
    last = ModelCheckpoint(dirpath=folder, filename="last", every_n_epochs=entry.epochs)
    module, _ = fit(entry, folder, callbacks=[*entry.callbacks(), last], module=Renaming(entry.name))
    assert entry.acted(module)
    saved = torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
    assert all(key.startswith("renamed.") for key in saved)
    return module, folder / "last.ckpt"


@pytest.mark.parametrize("entry", cases())
def test_documented_helper_asks_the_module(entry, tmp_path):
    module, ckpt = fitted(entry, tmp_path)
    assert_equal_modules(module, load_from_checkpoint(Renaming, ckpt))


@pytest.mark.parametrize("entry", cases())
def test_trainer_without_the_callback_asks_the_module(entry, tmp_path):
    module, ckpt = fitted(entry, tmp_path)
    fresh = enable_low_rank_loading(Renaming(entry.name))
    trainer(tmp_path / "new", []).test(fresh, loader(entry.data()), ckpt_path=ckpt, verbose=False)
    assert_equal_modules(module, fresh)


@pytest.mark.parametrize("entry", cases())
def test_resumed_run_asks_the_module(entry, tmp_path):
    module, ckpt = fitted(entry, tmp_path)
    resumed, runner = fit(entry, tmp_path, module=Renaming(entry.name), ckpt_path=ckpt, max_epochs=entry.epochs + 1)
    assert runner.current_epoch == entry.epochs + 1
    assert entry.acted(resumed)
    assert sorted(resumed.state_dict()) == sorted(module.state_dict())
