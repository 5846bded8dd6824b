"""StatefulStreams: truncated backpropagation equals the whole computation where it must."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recurrent_errors import relative_errors
from torch import nn

from lightning_accel.callbacks import IntraStreamScheduling, StatefulStreams
from lightning_accel.recurrent import PeepholeLSTMCell, Recurrent
from lightning_accel.zoo.data.loading import ResumableLoader

STEPS, BATCHES, STREAMS = 4, 3, 2


class Model(LightningModule):
    def __init__(self, kind, lr=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = Recurrent(PeepholeLSTMCell(2, 3), schedule="loop") if kind == "recurrent" else kind(2, 3)
        self.double()
        self.lr, self.outputs, self.gradients = lr, [], []

    def training_step(self, batch, batch_idx):
        y, _ = self.rnn(batch["x"])
        self.outputs.append(y.detach())
        return y.square().sum()

    def on_after_backward(self):
        self.gradients.append([p.grad.clone() for p in self.parameters()])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def stream():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS * BATCHES, STREAMS, 2, generator=generator, dtype=torch.double)


def batches(resets=None, x=None):
    x = stream() if x is None else x
    resets = resets or [[False] * STREAMS] * BATCHES
    return [{"x": c, "new": torch.tensor(r)} for c, r in zip(x.split(STEPS), resets, strict=True)]


def fit(kind, callbacks, data, epochs=1, lr=0.0, **settings):
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    model = kind if isinstance(kind, Model) else Model(kind, lr)
    runner = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=checkpoints, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    runner.fit(model, ResumableLoader(data, batch_size=None), **settings)
    return model, runner


KINDS = ["recurrent", nn.LSTM, nn.GRU]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_compute_what_the_whole_stream_computes(kind):
    model, _ = fit(kind, StatefulStreams(), batches(), epochs=2)
    whole, _ = model.rnn(stream())
    for epoch in (model.outputs[:BATCHES], model.outputs[BATCHES:]):
        torch.testing.assert_close(torch.cat(epoch), whole)
    assert "forward" not in model.rnn.__dict__


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_begins_one_stream_anew(kind):
    resets = [[False, False], [False, False], [False, True]]
    model, _ = fit(kind, StatefulStreams(resets="new"), batches(resets))
    whole, _ = model.rnn(stream())
    alone, _ = model.rnn(stream()[2 * STEPS :])
    torch.testing.assert_close(model.outputs[2][:, 0], whole[2 * STEPS :, 0])
    torch.testing.assert_close(model.outputs[2][:, 1], alone[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_as_many_steps_back_as_wanted(kind):
    for prefix, reached in ((0, 1), (1, 2), (2, 3)):
        model, _ = fit(kind, StatefulStreams(prefix_batches=prefix), batches())
        x = stream()
        start = (BATCHES - reached) * STEPS
        state = None
        if start:
            with torch.no_grad():
                _, state = model.rnn(x[:start])
        y, _ = model.rnn(x[start:], state)
        expected = torch.autograd.grad(y[-STEPS:].square().sum(), list(model.parameters()))
        for a, e in zip(model.gradients[-1], expected, strict=True):
            torch.testing.assert_close(a, e)


def test_a_reset_within_the_prefix_stops_the_gradient():
    resets = [[False, False], [True, True], [False, False]]
    reset, _ = fit(nn.GRU, StatefulStreams(resets="new", prefix_batches=2), batches(resets))
    y, _ = reset.rnn(stream()[STEPS:])
    expected = torch.autograd.grad(y[-STEPS:].square().sum(), list(reset.parameters()))
    for a, e in zip(reset.gradients[-1], expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_at_every_border_is_the_whole_computations(kind):
    borders = []

    class Watching(StatefulStreams):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            borders.append(copy.deepcopy(self.state_dict()["rnn"]["start"]))

    model, _ = fit(kind, Watching(), batches())
    x = stream()
    for k, carried in enumerate(borders):
        _, expected = model.rnn(x[: (k + 1) * STEPS])
        found = torch.utils._pytree.tree_leaves(carried)
        for a, e in zip(found, torch.utils._pytree.tree_leaves(expected), strict=True):
            assert not a.requires_grad
            torch.testing.assert_close(a, e.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_every_batchs_gradient_is_that_of_its_window(kind):
    """Within the window the gradient is exact; what lies before it counts as a constant."""
    model, _ = fit(kind, StatefulStreams(), batches())
    x, state = stream(), None
    for k, found in enumerate(model.gradients):
        y, state = model.rnn(x[k * STEPS : (k + 1) * STEPS], state)
        expected = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        state = torch.utils._pytree.tree_map(torch.Tensor.detach, state)
        errors = relative_errors(dict(enumerate(found)), dict(enumerate(expected)))
        assert max(errors.values()) <= 1e-12, errors


def test_a_window_as_long_as_the_stream_has_the_whole_gradient():
    model, _ = fit(nn.LSTM, StatefulStreams(prefix_batches=BATCHES - 1), batches())
    y, _ = model.rnn(stream())
    expected = torch.autograd.grad(y[-STEPS:].square().sum(), list(model.parameters()))
    errors = relative_errors(dict(enumerate(model.gradients[-1])), dict(enumerate(expected)))
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("schedule", ["intra_stream", "auto"])
def test_scheduled_layers_carry_their_state_too(schedule):
    resets = [[False, False], [True, False], [False, True]]
    plain, _ = fit("recurrent", StatefulStreams(resets="new", prefix_batches=1), batches(resets), lr=0.01, epochs=2)
    model = Model("recurrent", 0.01)
    model.rnn.schedules[0].schedule = schedule
    both = [StatefulStreams(resets="new", prefix_batches=1), IntraStreamScheduling()]
    fit(model, both, batches(resets), epochs=2)
    torch.testing.assert_close(model.outputs, plain.outputs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.gradients, plain.gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("prefix", [0, 1])
def test_a_run_resumed_within_an_epoch_equals_the_uninterrupted_one(prefix, tmp_path):
    resets = [[False, False], [False, True], [True, False]]

    def run(**settings):
        every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [StatefulStreams(resets="new", prefix_batches=prefix), every]
        return fit(nn.LSTM, callbacks, batches(resets), lr=0.01, epochs=2, **settings)[0]

    whole = run()
    for step in (1, 2, 4, 5):
        resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert len(resumed.outputs) == 2 * BATCHES - step
        for found, expected in zip(resumed.outputs, whole.outputs[step:], strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(found, expected)


def test_wrong_uses_are_refused():
    with pytest.raises(ValueError, match="`prefix_batches` must be >= 0, got -1"):
        StatefulStreams(prefix_batches=-1)
    with pytest.raises(ValueError, match="`resets='old'` must lead to a boolean tensor"):
        fit(nn.GRU, StatefulStreams(resets="old"), batches())
    x = [*stream()[: 2 * STEPS].split(STEPS), stream()[2 * STEPS :, :1]]
    with pytest.raises(ValueError, match="streams can not change their number"):
        fit(nn.GRU, StatefulStreams(), [{"x": c} for c in x])

    class Empty(Model):
        def __init__(self):
            super().__init__(nn.GRU)
            self.rnn = nn.Linear(2, 3)

    with pytest.raises(MisconfigurationException, match="found no layer whose state can be carried in Empty"):
        fit(Empty(), StatefulStreams(), batches())
