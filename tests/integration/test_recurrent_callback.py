"""IntraStreamScheduling in real fits of unchanged modules: same losses, same keys, nothing left behind."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.callbacks import IntraStreamScheduling
from lightning_accel.recurrent import PeepholeLSTMCell, Recurrent

STEPS, FEATURES, HIDDEN = 9, 3, 4


class Body(LightningModule):
    """Train on sequences (batch, time, features); subclasses say what happens to them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.build()
        self.double()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self(batch[0].transpose(0, 1)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LSTMLoop(Body):
    def build(self):
        self.cell, self.out = nn.LSTMCell(FEATURES, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x):
        state, hidden = None, []
        for t in range(len(x)):
            state = self.cell(x[t], state)
            hidden.append(state[0])
        return self.out(torch.stack(hidden))


class GRULoop(Body):
    def build(self):
        self.cell, self.out = nn.GRUCell(FEATURES, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], HIDDEN)
        for step in x:
            h = self.cell(step, h)
        return self.out(h)


class StackedLoop(Body):
    def build(self):
        self.embed = nn.Linear(FEATURES, FEATURES)
        self.lower, self.upper = nn.LSTMCell(FEATURES, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN)

    def forward(self, x):
        x = self.embed(x)
        lower = upper = (x.new_zeros(x.shape[1], HIDDEN),) * 2
        hidden = []
        for t in range(len(x)):
            lower = self.lower(x[t], lower)
            upper = self.upper(lower[0], upper)
            hidden.append(upper[0])
        return torch.cat(hidden, -1) * hidden[2].mean() + upper[1].sum()


class PeepholeLoop(Body):
    def build(self):
        self.cell = PeepholeLSTMCell(FEATURES, HIDDEN)

    def forward(self, x):
        state = self.cell.initial_state(x[0])
        hidden = []
        for step in x:
            y, state = self.cell(step, state)
            hidden.append(y)
        return torch.stack(hidden, 1) + state[1].mean()


class EncoderDecoder(Body):
    def build(self):
        self.encoder, self.decoder = nn.LSTMCell(FEATURES, HIDDEN), nn.LSTMCell(FEATURES, HIDDEN)
        self.out = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x):
        state = None
        for step in x:
            state = self.encoder(step, state)
        hidden = []
        for step in x[:-1]:
            state = self.decoder(step, state)
            hidden.append(state[0])
        return self.out(torch.stack(hidden)) - x[1:]


class OwnOutput(Body):
    def build(self):
        self.cell, self.out = nn.LSTMCell(FEATURES, HIDDEN), nn.Linear(HIDDEN, FEATURES)

    def forward(self, x):
        state, y, outputs = None, x[0], []
        for _ in x:
            state = self.cell(y, state)
            y = self.out(state[0])
            outputs.append(y)
        return torch.stack(outputs)


class PackedLSTM(Body):
    def build(self):
        self.rnn = nn.LSTM(FEATURES, HIDDEN, num_layers=2, dropout=0.3, bidirectional=True)

    def forward(self, x):
        lengths = torch.tensor([9, 2, 5, 7])[: x.shape[1]]
        packed, (h, c) = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(packed)[0].sum() + h.sum() + c.sin().sum()


class RecurrentLayer(Body):
    def build(self):
        self.rnn = Recurrent(PeepholeLSTMCell(FEATURES, HIDDEN))

    def forward(self, x):
        return self.rnn(x)[0]


class MLP(Body):
    def build(self):
        self.layer = nn.Linear(FEATURES, 1)

    def forward(self, x):
        return self.layer(x)


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, STEPS, FEATURES, generator=generator, dtype=torch.double)
    return DataLoader(TensorDataset(x), batch_size=4)


def trainer(*callbacks, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"max_epochs": 2, "enable_checkpointing": False} | settings
    return Trainer(callbacks=list(callbacks), **quiet, **settings)


def fit(kind, *callbacks, **settings):
    module = kind()
    torch.manual_seed(5)
    runner = trainer(*callbacks, **settings)
    runner.fit(module, data())
    return module


LOOPS = [LSTMLoop, GRULoop, StackedLoop, PeepholeLoop, EncoderDecoder]


@pytest.mark.parametrize("schedule", ["auto", "intra_stream", "native"])
@pytest.mark.parametrize("kind", [*LOOPS, OwnOutput, PackedLSTM, RecurrentLayer])
def test_an_unchanged_module_trains_to_the_same_parameters(kind, schedule):
    if schedule == "native" and kind in (PeepholeLoop, RecurrentLayer):
        schedule = "intra_stream"
    plain = fit(kind)
    callback = IntraStreamScheduling(schedule)
    module = fit(kind, callback)
    torch.testing.assert_close(module.losses, plain.losses, rtol=1e-10, atol=1e-12)
    for (name, actual), expected in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=name)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert callback.report
    assert all("forward" not in child.__dict__ for child in module.modules())


@pytest.mark.parametrize("kind", LOOPS)
def test_loops_over_cells_become_chains(kind):
    callback = IntraStreamScheduling("intra_stream")
    fit(kind, callback)
    assert all("chains of" in line for line in callback.report), callback.report


def test_a_decoder_that_feeds_its_output_back_runs_plain():
    callback = IntraStreamScheduling()
    fit(OwnOutput, callback)
    assert "uses every step's result" in callback.report[0]


def test_packed_calls_run_padded_and_the_checkpoint_loads_without_the_callback(tmp_path):
    callback = IntraStreamScheduling()
    module = fit(PackedLSTM, callback)
    assert callback.report == ["rnn: 6 packed calls run padded"]
    runner = trainer(callback, enable_checkpointing=True, max_epochs=1, default_root_dir=tmp_path)
    runner.fit(module, data())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    loaded = PackedLSTM.load_from_checkpoint(tmp_path / "last.ckpt")
    x = next(iter(data()))[0].transpose(0, 1)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_a_resumed_run_repeats_the_choice(tmp_path):
    callback = IntraStreamScheduling()
    module = StackedLoop()
    runner = trainer(callback, max_epochs=1)
    runner.fit(module, data())
    runner.save_checkpoint(tmp_path / "one.ckpt")
    other = IntraStreamScheduling()
    runner = trainer(other, max_epochs=2)
    runner.fit(StackedLoop(), data(), ckpt_path=tmp_path / "one.ckpt")
    chosen = {n: c["choices"] for n, c in callback.state_dict()["deferred"]["cells"].items()}
    assert chosen == {n: c["choices"] for n, c in other.state_dict()["deferred"]["cells"].items()}
    uninterrupted = fit(StackedLoop, *[_with_state(callback)], max_epochs=2)
    assert len(uninterrupted.losses) == 6


def _with_state(callback):
    twin = IntraStreamScheduling()
    twin.load_state_dict(callback.state_dict())
    return twin


def test_nothing_to_act_on_is_an_error():
    with pytest.raises(MisconfigurationException, match="found no recurrent layer in MLP"):
        fit(MLP, IntraStreamScheduling())


def test_loop_changes_nothing():
    callback = IntraStreamScheduling("loop")
    module, plain = fit(StackedLoop, callback), fit(StackedLoop)
    assert module.losses == plain.losses


def test_copies_pickles_and_a_second_fit():
    callback = IntraStreamScheduling("native", packed=False)
    runner = trainer(callback, max_epochs=1)
    module = LSTMLoop()
    runner.fit(module, data())
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (twin.schedule, twin.packed, twin.deferred_cells) == ("native", False, True)
        assert twin.state_dict() == callback.state_dict()
    again = trainer(callback, max_epochs=1)
    again.fit(module, data())
    assert "chains of" in callback.report[0]


def test_an_exception_leaves_the_module_as_it_was():
    class Fails(LSTMLoop):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                raise RuntimeError("on purpose")
            return loss

    module = Fails()
    original = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(IntraStreamScheduling("native")).fit(module, data())
    assert "forward" not in module.cell.__dict__
    assert torch.autograd.Function.__dict__["apply"] is original


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="`schedule` must be one of"):
        IntraStreamScheduling("fast")
