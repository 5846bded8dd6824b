"""StatefulStreams: truncated backpropagation equals the whole computation where it must."""

import copy
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recurrent_errors import relative_errors
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.callbacks import IntraStreamScheduling, StatefulStreams
from lightning_accel.recurrent import GraphRNN, PeepholeLSTMCell, Recurrent
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
            borders.append(copy.deepcopy(self.state_dict()["rnn"]["streams"][0]["start"]))

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


# ---- how layers are called ----


class Subclass(nn.LSTM):
    """Packs inside, as the layers of some packages do."""

    def forward(self, x, hx=None, lengths=None, **kwargs):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, state = super().forward(packed, hx)
        return pad_packed_sequence(y)[0], state


class OwnForward(nn.GRU):
    def forward(self, x):
        return super().forward(x)


def graph(inputs, units):
    nodes = {"x": {"size": inputs}, "h": {"size": units, "activation": "tanh"}}
    return GraphRNN(nodes, ["x -> h", "h -> h delay=1"], ["x"], ["h"], schedule="loop")


def scheduled(inputs, units):
    return Recurrent(PeepholeLSTMCell(inputs, units), schedule="intra_stream")


def packed(layer, x):
    y, state = layer(pack_padded_sequence(x, [STEPS] * x.shape[1]))
    return pad_packed_sequence(y)[0], state


def in_two_pieces(layer, x):
    first, state = layer(x[:2])
    second, state = layer(x[2:], state)
    return torch.cat([first, second]), state


class NamedState(NamedTuple):
    hidden: torch.Tensor
    memory: torch.Tensor


class NamedStateCell(PeepholeLSTMCell):
    def initial_state(self, x):
        return NamedState(*super().initial_state(x))

    def forward(self, x, state):
        y, following = super().forward(x, (state.hidden, state.memory))
        return y, NamedState(*following)


LENGTHS = torch.full((STREAMS,), STEPS)
CALLS = {
    "keyword": (nn.LSTM, lambda layer, x: layer(input=x)),
    "hx is None": (nn.GRU, lambda layer, x: layer(x, None)),
    "hx is None by keyword": (nn.RNN, lambda layer, x: layer(hx=None, input=x)),
    "packed": (nn.LSTM, packed),
    "lengths": (scheduled, lambda layer, x: layer(x, lengths=LENGTHS)),
    "lengths by place": (scheduled, lambda layer, x: layer(x, None, LENGTHS)),
    "a packed Recurrent": (scheduled, packed),
    "a graph": (graph, lambda layer, x: layer(x)),
    "a graph by keyword": (graph, lambda layer, x: layer(x=x, lengths=LENGTHS)),
    "a subclass": (Subclass, lambda layer, x: layer(x, lengths=LENGTHS)),
    "in two pieces": (nn.LSTM, in_two_pieces),
    "a named state": (
        lambda inputs, units: Recurrent(NamedStateCell(inputs, units), schedule="loop"),
        lambda layer, x: layer(x),
    ),
}


class Called(Model):
    def __init__(self, kind, call, lr=0.0):
        super().__init__(nn.GRU, lr)
        torch.manual_seed(0)
        self.rnn, self.call = kind(2, 3).double(), call

    def training_step(self, batch, batch_idx):
        y, _ = self.call(self.rnn, batch["x"])
        self.outputs.append(y.detach())
        return y.square().sum()


@pytest.mark.parametrize("name", list(CALLS))
def test_how_a_layer_is_called_does_not_matter(name):
    kind, call = CALLS[name]
    model, _ = fit(Called(kind, call), StatefulStreams(), batches())
    whole = Called(kind, call).rnn
    expected = whole(stream(), lengths=LENGTHS * BATCHES)[0] if kind is Subclass else whole(stream())[0]
    torch.testing.assert_close(torch.cat(model.outputs), expected)


@pytest.mark.parametrize("name", ["packed", "a graph", "keyword"])
def test_gradients_reach_back_through_every_kind_of_call(name):
    kind, call = CALLS[name]
    model, _ = fit(Called(kind, call), StatefulStreams(prefix_batches=1), batches())
    x = stream()
    with torch.no_grad():
        _, state = model.rnn(x[:STEPS])
    y, _ = model.rnn(x[STEPS:], state)
    expected = torch.autograd.grad(y[-STEPS:].square().sum(), list(model.parameters()))
    torch.testing.assert_close(model.gradients[-1], list(expected))


def test_sequences_of_their_own_lengths_go_on_where_they_ended():
    lengths = [4, 2]

    def call(layer, x):
        y, state = layer(pack_padded_sequence(x, lengths))
        return pad_packed_sequence(y)[0], state

    model, _ = fit(Called(nn.GRU, call), StatefulStreams(), batches())
    kept = torch.cat([x[: lengths[1], 1:] for x in stream().split(STEPS)])
    expected, _ = model.rnn(kept)
    for k, y in enumerate(model.outputs):
        torch.testing.assert_close(y[:2, 1:], expected[2 * k : 2 * k + 2])


def test_two_calls_a_batch_are_two_streams():
    def call(layer, x):
        return torch.cat([layer(x)[0], layer(2 * x)[0]], -1), None

    model, _ = fit(Called(nn.LSTM, call), StatefulStreams(), batches())
    x = stream()
    torch.testing.assert_close(torch.cat(model.outputs), torch.cat([model.rnn(x)[0], model.rnn(2 * x)[0]], -1))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("name", "prefix"),
    [*((name, 0) for name in ("packed", "a graph", "in two pieces", "a named state")), ("packed", 1), ("keyword", 1)],
)
def test_every_kind_of_call_resumes_exactly_within_an_epoch(name, prefix, tmp_path):
    kind, call = CALLS[name]

    def run(**settings):
        every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [StatefulStreams(prefix_batches=prefix), every]
        return fit(Called(kind, call, lr=0.01), callbacks, batches(), epochs=2, **settings)[0]

    whole = run()
    for step in (1, 5):
        resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(resumed.outputs, whole.outputs[step:], strict=True))


class Checkpointed(Called):
    def training_step(self, batch, batch_idx):
        return checkpoint(lambda x: self.rnn(x)[0], batch["x"].requires_grad_(), use_reentrant=False).sum()


class Varying(Called):
    def training_step(self, batch, batch_idx):
        return sum(self.rnn(batch["x"])[0].sum() for _ in range(1 + batch_idx % 2))


class WithLBFGS(Called):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def clocked(inputs, units):
    nodes = {"x": {"size": inputs}, "h": {"size": units}, "tick": {"size": units, "period": 2}}
    edges = ["x -> h", "tick -> h identity", "h -> h delay=1"]
    return GraphRNN(nodes, edges, ["x"], ["h"], schedule="loop")


def plainly(layer, x):
    return layer(x)


REFUSED = {
    "bidirectional": (
        lambda: Called(lambda i, h: nn.LSTM(i, h, bidirectional=True), plainly),
        "`rnn` is bidirectional",
    ),
    "both ways": (
        lambda: Called(lambda i, h: Recurrent(PeepholeLSTMCell(i, h), bidirectional=True, schedule="loop"), plainly),
        "`rnn` is bidirectional",
    ),
    "clocks": (lambda: Called(clocked, plainly), "`rnn` has clocks"),
    "no state": (lambda: Called(OwnForward, plainly), "OwnForward.forward takes no argument `hx` or `state`"),
    "closures": (lambda: WithLBFGS(nn.GRU, plainly), "through LBFGS, which runs its closure"),
    "checkpointing": (lambda: Checkpointed(nn.GRU, plainly), "`rnn`, which checkpointing runs again"),
    "another number of calls": (lambda: Varying(nn.GRU, plainly), "it was called 2 times in this batch and 1 times"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_can_not_be_carried_is_refused_by_name(name):
    make, said = REFUSED[name]
    with pytest.raises((ValueError, MisconfigurationException), match=said):
        fit(make(), StatefulStreams(), batches())


def test_shuffled_data_is_refused():
    data = DataLoader(TensorDataset(torch.randn(6, 4, 2)), 2, shuffle=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    runner = Trainer(max_epochs=1, accelerator="cpu", callbacks=[StatefulStreams()], **quiet)
    with pytest.raises(MisconfigurationException, match="training data is shuffled"):
        runner.fit(Model(nn.GRU), data)
