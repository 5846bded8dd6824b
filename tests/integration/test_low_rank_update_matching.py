"""`RankQuantization(match_updates=True)` in fits: groups stay whole, runs resume, what can not be matched is said."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from low_rank_models import Classifier, train

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd.shared_memory.supervisor import WorkerFailedError
from lightning_accel.callbacks import RankQuantization, SequentialFreezing
from lightning_accel.low_rank import low_rank_layers
from lightning_accel.low_rank.optimizers import matched_updates

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
ADAMW = {"optimizer": "AdamW", "settings": {"lr": 0.01, "weight_decay": 0.1}}
SAYS = ".*leaves the optimizer's steps as they are"


def low_rank(**settings):
    return RankQuantization(
        **{"ratio": 3.0, "method": "fixed", "when": "setup", "on_loss": "keep", "match_updates": True, **settings}
    )


def classifier(**settings):
    return Classifier(noisy=False, **{**ADAMW, **settings})


def equal(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


class Rates(Callback):
    """Learning rates that the factors of ``net.4`` are updated with, and the groups that hooks see."""

    def __init__(self, monkeypatch):
        self.rates, self.seen, self.module = [], set(), None
        # what an optimizer calls between its update and its hooks
        monkeypatch.setattr(torch.optim.Optimizer, "_optimizer_step_code", lambda optimizer: self._note(optimizer))

    def on_fit_start(self, trainer, pl_module):
        self.module = pl_module

    def _note(self, optimizer):
        layer = low_rank_layers(self.module).get("net.4") if self.module is not None else None
        for group in optimizer.param_groups:
            if layer is not None and any(parameter is layer.factor_in for parameter in group["params"]):
                self.rates.append(group["lr"])

    def _look(self, trainer, *_):
        self.seen.add(len(trainer.optimizers[0].param_groups))

    on_train_batch_start = on_before_backward = on_after_backward = on_before_optimizer_step = _look
    on_before_zero_grad = on_train_batch_end = on_train_epoch_end = on_train_end = _look


def test_factors_have_a_rate_of_their_own_in_steps_and_no_group_between_them(tmp_path, monkeypatch):
    module, rates, callback = classifier(), Rates(monkeypatch), low_rank()
    trainer = train(
        module, [callback, rates, LearningRateMonitor()], tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1
    )
    assert set(callback.state_dict()["update_multipliers"]) == set(low_rank_layers(module))
    multiplier = callback.state_dict()["update_multipliers"]["net.4"]
    assert multiplier > 1.0
    assert rates.rates == [0.01 * multiplier] * 12
    assert rates.seen == {1}
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.01]


def test_matching_is_asked_for(tmp_path, monkeypatch):
    plain, matched, rates = classifier(), classifier(), Rates(monkeypatch)
    train(plain, [low_rank(match_updates=False), rates], tmp_path)
    rates.module = None
    train(matched, [low_rank()], tmp_path)
    assert set(rates.rates) == {0.01}
    assert not equal(plain, matched)


@pytest.mark.parametrize("freezing", [False, True], ids=["alone", "with freezing"])
@pytest.mark.parametrize("asked_again", [True, False])
def test_a_resumed_run_keeps_the_multipliers_of_its_checkpoint(asked_again, freezing, tmp_path):
    others = [SequentialFreezing(period_steps=5)] if freezing else []
    every = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole = classifier()
    train(whole, [low_rank(), *others, every], tmp_path, epochs=4, enable_checkpointing=True)
    for epoch in (0, 2):
        resumed, callback = classifier(), low_rank(match_updates=asked_again)
        again = [SequentialFreezing(period_steps=5)] if freezing else []
        train(resumed, [callback, *again], tmp_path, epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert equal(whole, resumed)
        assert callback.state_dict()["update_multipliers"]


def test_a_checkpoint_from_before_there_were_multipliers_resumes_without(tmp_path):
    every = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole = classifier()
    train(whole, [low_rank(match_updates=False), every], tmp_path, epochs=2, enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)
    (state,) = [state for key, state in saved["callbacks"].items() if "RankQuantization" in key]
    del state["update_multipliers"]
    torch.save(saved, tmp_path / "old.ckpt")
    resumed = classifier()
    train(resumed, [low_rank()], tmp_path, epochs=2, ckpt_path=tmp_path / "old.ckpt")
    assert equal(whole, resumed)


def test_a_second_fit_goes_on_with_the_same_multipliers(tmp_path, monkeypatch):
    module, callback, rates = classifier(), low_rank(), Rates(monkeypatch)
    train(module, [callback], tmp_path)
    before = callback.state_dict()["update_multipliers"]
    train(module, [callback, rates], tmp_path)
    assert callback.state_dict()["update_multipliers"] == before
    assert rates.rates == [0.01 * before["net.4"]] * 12


def test_other_optimizers_are_left_as_they_are_and_it_is_said_once(tmp_path):
    plain, asked = (classifier(optimizer="SGD", settings={"lr": 0.1}) for _ in range(2))
    train(plain, [low_rank(match_updates=False)], tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=SAYS)
        train(asked, [low_rank()], tmp_path)
    (line,) = (str(warning.message) for warning in caught)
    assert line.endswith("SGD is none of Adam, AdamW, NAdam, Adamax, whose steps have the size of the learning rate.")
    assert low_rank_layers(asked)
    assert equal(plain, asked)


@pytest.mark.filterwarnings(f"ignore:{SAYS}")
def test_the_steps_of_asynchronous_workers_are_left_as_they_are(tmp_path):
    plain, asked = classifier(), classifier()
    train(plain, [low_rank(match_updates=False, when=1)], tmp_path, strategy=AsyncSGDStrategy(), devices=1)
    callback = low_rank(when=1)
    train(asked, [callback], tmp_path, strategy=AsyncSGDStrategy(), devices=1)
    assert low_rank_layers(asked)
    assert equal(plain, asked)
    assert callback.state_dict()["update_multipliers"] == {}, "or a fit that goes on would begin to use them"


def test_asynchronous_workers_say_that_a_server_makes_the_steps(tmp_path):
    with pytest.raises(WorkerFailedError, match="AsyncSGDStrategy makes the steps elsewhere"):  # warnings are errors
        train(classifier(), [low_rank()], tmp_path, strategy=AsyncSGDStrategy(), devices=1)


@pytest.mark.filterwarnings("ignore:RankQuantization put net.4 back")
def test_a_layer_that_becomes_dense_again_has_the_groups_rate(tmp_path, monkeypatch):
    class Write(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                pl_module.net[4].weight.data.mul_(0.5)

    module, rates = classifier(), Rates(monkeypatch)
    trainer = train(module, [low_rank(), Write(), rates], tmp_path)
    assert "net.4" not in low_rank_layers(module)
    assert len(rates.rates) == 3
    assert rates.seen == {1}
    (group,) = trainer.optimizers[0].param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in module.parameters()}


def test_a_step_that_fails_leaves_a_checkpoint_with_whole_groups(tmp_path, monkeypatch):
    whole = matched_updates.MatchedUpdates._split

    def split(self):
        whole(self)
        if self._optimizer.state and max(float(s["step"]) for s in self._optimizer.state.values()) == 4.0:
            raise KeyboardInterrupt

    monkeypatch.setattr(matched_updates.MatchedUpdates, "_split", split)
    saved = ModelCheckpoint(dirpath=tmp_path, filename="end", save_on_exception=True)
    module = classifier()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(module, [low_rank(), saved], tmp_path, enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    (state,) = torch.load(path, weights_only=False)["optimizer_states"]
    assert [len(group["params"]) for group in state["param_groups"]] == [len(list(module.parameters()))]


def test_a_copied_callback_works_by_itself(tmp_path):
    callback = low_rank()
    train(classifier(), [copy.deepcopy(callback)], tmp_path)
    assert callback.state_dict()["update_multipliers"] == {}
