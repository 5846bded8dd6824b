"""Resumed runs: what was decided holds, although a fresh clock would have said otherwise; phases and DDP go on."""

import os

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from low_rank_models import Classifier, train

from lightning_accel.callbacks import RankQuantization, SequentialFreezing
from lightning_accel.callbacks.rank_quantization import step_times as _step_times
from lightning_accel.low_rank import decompose, low_rank_layers, make_plan
from lightning_accel.low_rank.rank_search import timing

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")


def clock(monkeypatch, *, low_rank_pays):
    """Let layers and whole steps take what the caller wants, in the search of ranks and in the trial."""
    factor = 0.2 if low_rank_pays else 5.0

    def fake(candidates, *, rounds, **_):
        for step in candidates.values():
            step()
        return {name: [1.0 if name == "dense" else factor] * rounds for name in candidates}

    monkeypatch.setattr(_step_times, "time_interleaved", fake)
    monkeypatch.setattr(timing.measure, "time_interleaved", fake)


def measured(folder):
    return RankQuantization(ratio=2.0, when=1, max_overhead=1000.0, min_energy=0.1, cache_dir=folder)


@pytest.mark.parametrize("first_pays", [True, False], ids=["low rank then slower", "dense then faster"])
@pytest.mark.parametrize("freezing", [False, True], ids=["alone", "with freezing"])
def test_fresh_times_that_differ_change_nothing(freezing, first_pays, tmp_path, monkeypatch):
    def callbacks(folder):
        return [measured(tmp_path / folder), *([SequentialFreezing(period_steps=5)] if freezing else [])]

    every = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    clock(monkeypatch, low_rank_pays=first_pays)
    whole = Classifier(noisy=False)
    trainer = train(whole, [*callbacks("one"), every], tmp_path, epochs=4, enable_checkpointing=True)
    assert bool(low_rank_layers(whole)) == first_pays

    clock(monkeypatch, low_rank_pays=not first_pays)
    for epoch in (1, 2):  # the decision lies behind, a phase of freezing is under way
        resumed = Classifier(noisy=False)
        path = tmp_path / f"epoch={epoch}.ckpt"
        again = train(resumed, callbacks(f"two {epoch}"), tmp_path, epochs=4, ckpt_path=path)
        one, other = whole.state_dict(), resumed.state_dict()
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
        one, other = trainer.optimizers[0].state_dict()["state"], again.optimizers[0].state_dict()["state"]
        assert all(torch.equal(one[i]["momentum_buffer"], other[i]["momentum_buffer"]) for i in one)


def test_weights_are_those_of_the_checkpoint_before_its_layers_are_in_their_places(tmp_path):
    class CopiesATeacher(Classifier):
        def configure_optimizers(self):
            self.teacher = {id(layer): layer.weight.detach().clone() for layer in (self.net[0], self.net[4])}
            return super().configure_optimizers()

    def low_rank():
        return RankQuantization(ratio=2.0, method="fixed", when="setup", on_loss="keep", exclude=["net.6"])

    module = Classifier()
    trainer = train(module, [low_rank()], tmp_path)
    trainer.save_checkpoint(tmp_path / "low_rank.ckpt")
    assert set(low_rank_layers(module)) == {"net.0", "net.4"}
    resumed = CopiesATeacher()
    train(resumed, [low_rank()], tmp_path, ckpt_path=tmp_path / "low_rank.ckpt")
    for index in (0, 4):
        torch.testing.assert_close(resumed.teacher[id(resumed.net[index])], module.net[index].weight.detach())


def test_unequal_phases_in_a_fit(tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.groups = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            layer = low_rank_layers(pl_module)["net.4"]
            frozen = [not getattr(layer, name).requires_grad for (name,) in layer.groups()]
            self.groups.append(frozen.index(True))

    module, watch = Classifier(), Watch()
    decompose(module, make_plan(module, None, ratio=2.0, method="fixed"))
    train(module, [SequentialFreezing(period_steps=3, weights=(2.0, 1.0)), watch], tmp_path, epochs=2)
    assert watch.groups == [0, 0, 0, 0, 1, 1] * 2


@pytest.fixture
def own_environment():
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("own_environment")
def test_ddp_reduces_the_gradients_of_exactly_what_trains(tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.rows = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            wrapped = trainer.strategy.model
            reduced = wrapped._get_ddp_logging_data()["num_parameter_tensors"]
            trainable = sum(parameter.requires_grad for parameter in pl_module.parameters())
            self.rows.append((id(wrapped), reduced, trainable))

    module, watch = Classifier(), Watch()
    decompose(module, make_plan(module, None, ratio=2.0, method="fixed"))
    everything = len(list(module.parameters()))
    callbacks = [SequentialFreezing(end=2), watch]
    settings = {"devices": 1, "strategy": DDPStrategy(process_group_backend="gloo"), "limit_val_batches": 0}
    train(module, callbacks, tmp_path, epochs=3, **settings)
    assert all(reduced == trainable for _, reduced, trainable in watch.rows)
    factors = len(low_rank_layers(module))
    assert [row[1] for row in watch.rows[::6]] == [everything - factors, everything - factors, everything]
    assert len({wrapper for wrapper, _, _ in watch.rows[:6]}) == 1, "wrapped once a phase, not once a step"
