"""StatefulStreams: truncated backpropagation equals the whole computation where it must."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_accel.callbacks import StatefulStreams
from lightning_accel.recurrent import PeepholeLSTMCell, Recurrent

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


def fit(kind, callback, data, epochs=1, lr=0.0, **settings):
    model = kind if isinstance(kind, Model) else Model(kind, lr)
    runner = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    runner.fit(model, DataLoader(data, batch_size=None), **settings)
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


def test_a_resumed_run_goes_on_with_the_state(tmp_path):
    whole, _ = fit(nn.LSTM, StatefulStreams(), batches(), lr=0.01)

    class Stop(StatefulStreams):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    fit(nn.LSTM, Stop(), batches(), lr=0.01)
    states = torch.load(tmp_path / "middle.ckpt", weights_only=True)["callbacks"]
    saved = next(state for name, state in states.items() if name.endswith("Stop"))
    callback = StatefulStreams()
    callback.load_state_dict(copy.deepcopy(saved))
    model = Model(nn.LSTM)
    callback.on_train_start(None, model)
    callback.on_train_epoch_start(None, model)
    callback.on_train_batch_start(None, model, batches()[2], 2)
    model.load_state_dict(torch.load(tmp_path / "middle.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(model.rnn(batches()[2]["x"])[0], whole.outputs[2])


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
