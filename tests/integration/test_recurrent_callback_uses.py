"""What people do around IntraStreamScheduling: changing shapes, validation, options of nn.LSTM, compiled modules."""

import logging
import warnings
from typing import ClassVar

import pytest
import torch
from recurrent_models import FEATURES, HIDDEN, Body, LSTMLoop, PeepholeLoop, RecurrentLayer, data, fit, trainer
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from lightning_accel.callbacks import IntraStreamScheduling
from lightning_accel.recurrent.compiler import executor
from lightning_accel.recurrent.schedule_choice import ScheduleChoice
from lightning_accel.recurrent.verified_schedules import VerifiedSchedules


def batches(*shapes):
    """Batches of (streams, steps) as given; each is a list of one tensor."""
    generator = torch.Generator().manual_seed(2)
    made = [[torch.randn(b, t, FEATURES, generator=generator, dtype=torch.double)] for b, t in shapes]
    return DataLoader(made, batch_size=None)


@pytest.mark.parametrize("kind", [PeepholeLoop, RecurrentLayer])
def test_changing_lengths_and_batch_sizes_make_no_new_plans(kind, monkeypatch):
    made, traced = [], []
    make, trace = VerifiedSchedules._make, executor.trace_step
    monkeypatch.setattr(VerifiedSchedules, "_make", lambda self, *a: made.append(a[0]) or make(self, *a))
    monkeypatch.setattr(executor, "trace_step", lambda *a: traced.append(1) or trace(*a))
    shapes = [(2, 9), (3, 9), (2, 12), (5, 7), (4, 20), (1, 9), (6, 17), (3, 33)]
    counts = []

    class Counting(kind):
        def on_train_batch_end(self, *_):
            counts.append((len(made), len(traced)))

    module, plain = Counting(), kind()
    trainer(IntraStreamScheduling("intra_stream"), max_epochs=1).fit(module, batches(*shapes))
    assert made == ["intra_stream"]
    assert counts[-1] == counts[1]
    trainer(max_epochs=1).fit(plain, batches(*shapes))
    torch.testing.assert_close(module.losses, plain.losses, rtol=1e-10, atol=1e-12)


def test_measured_choices_are_made_once_for_each_power_of_two(monkeypatch):
    chosen = []
    choose = ScheduleChoice._choose
    monkeypatch.setattr(ScheduleChoice, "_choose", lambda self, key, *a: chosen.append(key) or choose(self, key, *a))
    shapes = [(4, 16), (4, 17), (3, 15), (5, 18), (4, 14), (4, 32), (4, 30), (4, 16)]
    trainer(IntraStreamScheduling(), max_epochs=2).fit(RecurrentLayer(), batches(*shapes))
    assert len(chosen) == len(set(chosen)) == 2


class Options(Body):
    """nn.LSTM with the options that people use, fed packed sequences."""

    options: ClassVar = {}

    def build(self):
        self.rnn = nn.LSTM(FEATURES, HIDDEN, **self.options)

    def forward(self, x):
        first = self.rnn.batch_first
        lengths = torch.tensor([9, 2, 5, 7])[: x.shape[1]]
        packed = pack_padded_sequence(
            x.transpose(0, 1) if first else x, lengths, batch_first=first, enforce_sorted=False
        )
        y, (h, c) = self.rnn(packed)
        return pad_packed_sequence(y, batch_first=first)[0].sin().mean() + h.mean() + c.cos().mean()


@pytest.mark.parametrize(
    "options",
    [
        {"bidirectional": True},
        {"proj_size": 2},
        {"proj_size": 2, "bidirectional": True, "num_layers": 2},
        {"num_layers": 2, "dropout": 0.5},
        {"batch_first": True},
        {"bias": False},
    ],
    ids=str,
)
def test_options_of_a_packed_lstm(options):
    kind = type("Optioned", (Options,), {"options": options})
    callback = IntraStreamScheduling()
    module, plain = fit(kind, callback), fit(kind)
    torch.testing.assert_close(module.losses, plain.losses, rtol=1e-10, atol=1e-12)
    assert callback.report == ["rnn: 6 packed calls run padded"]


# Lightning says so of any callback that is missing in a resumed run
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_a_packed_lstm_in_single_precision(tmp_path):
    class Single(Options):
        def __init__(self):
            super().__init__()
            self.float()

        def forward(self, x):
            return super().forward(x.float())

    callback = IntraStreamScheduling()
    module, plain = fit(Single, callback), fit(Single)
    torch.testing.assert_close(module.losses, plain.losses, rtol=1e-5, atol=0.0)
    assert list(module.state_dict()) == list(plain.state_dict())
    runner = trainer(callback, max_epochs=1, default_root_dir=tmp_path)
    runner.fit(module, data())
    runner.save_checkpoint(tmp_path / "end.ckpt")
    loaded = Single.load_from_checkpoint(tmp_path / "end.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    trainer(max_epochs=2).fit(Single(), data(), ckpt_path=tmp_path / "end.ckpt")


class Validated(RecurrentLayer):
    def validation_step(self, batch, batch_idx):
        self.log("loss", self(batch[0].transpose(0, 1)).square().mean())


def test_validation_before_the_first_step():
    """In inference mode, which must leave nothing behind that training can not use."""
    module, plain = Validated(), Validated()
    for model, callbacks in ((module, [IntraStreamScheduling("intra_stream")]), (plain, [])):
        model.rnn.schedules[0].schedule = "auto" if callbacks else "loop"
        runner = trainer(*callbacks, num_sanity_val_steps=2)
        runner.validate(model, data(), verbose=False)
        runner.fit(model, data(), data())
        runner.validate(model, data(), verbose=False)
    torch.testing.assert_close(module.losses, plain.losses, rtol=1e-10, atol=1e-12)


def test_a_plain_nn_lstm_is_as_fast_as_it_can_be_and_says_so(caplog):
    class Plain(Body):
        def build(self):
            self.rnn = nn.LSTM(FEATURES, HIDDEN, bidirectional=True)

        def forward(self, x):
            return self.rnn(x)[0]

    callback = IntraStreamScheduling()
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        module, plain = fit(Plain, callback), fit(Plain)
    assert module.losses == plain.losses
    assert callback.report == ["rnn: torch's kernel, nothing to gain"]
    assert callback.report[0] in caplog.text


# torch 2.13 looks at the gradients of non-leaves itself where a graph breaks
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("part", ["whole", "cell"])
def test_compiled_modules_are_left_alone(part):
    torch.compiler.reset()
    callback = IntraStreamScheduling()
    module = LSTMLoop()
    if part == "cell":
        module.cell.compile(backend="eager")
    compiled = torch.compile(module, backend="eager") if part == "whole" else module
    trainer(callback, max_epochs=1).fit(compiled, data())
    plain = fit(LSTMLoop, max_epochs=1)
    torch.testing.assert_close(module.losses, plain.losses, rtol=1e-10, atol=1e-12)
    assert callback.report == ["cell: plain, it is compiled"]


def test_a_cell_that_is_called_once_is_no_loop():
    class Once(Body):
        def build(self):
            self.cell = nn.LSTMCell(FEATURES, HIDDEN)

        def forward(self, x):
            return self.cell(x[0])[0]

    callback = IntraStreamScheduling()
    fit(Once, callback)
    assert callback.report == ["cell: plain, called 1 times in a step, not in a loop"]


def test_modules_that_could_be_cells_and_are_none_are_said_in_a_warning_at_the_end():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(FEATURES, FEATURES)

        def forward(self, x):
            return self.layer(x)

    class Blocks(Body):
        def build(self):
            self.block = Block()

        def forward(self, x):
            return self.block(x)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module = fit(Blocks, IntraStreamScheduling())
    assert any("found no recurrent layer in Blocks" in str(w.message) for w in said)
    assert len(module.losses) == 6


def test_the_error_for_an_unknown_schedule_names_all():
    names = "auto.*loop.*intra_stream.*scan.*native"
    with pytest.raises(ValueError, match=f"`schedule` must be one of .*{names}.*, got 'fastest'"):
        IntraStreamScheduling("fastest")


def test_a_profiler_that_looks_at_every_step_of_one_batch_ends_nothing():
    class Profiled(LSTMLoop):
        def training_step(self, batch, batch_idx):
            self.watched = self.global_step == 3
            return super().training_step(batch, batch_idx)

        def forward(self, x):
            if not self.watched:
                return super().forward(x)
            state, hidden = None, []
            for step in x:
                state = self.cell(step, state)
                hidden.append(state[0] + state[0].abs().sum().item() * 0)
            return self.out(torch.stack(hidden))

    callback = IntraStreamScheduling("native")
    fit(Profiled, callback, max_epochs=3)
    assert "chains of" in callback.report[0]
    assert "plain" not in callback.report[0]
