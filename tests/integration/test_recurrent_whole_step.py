"""A whole training step is compared before a loop is computed at once: what is found, and that nothing is left."""

import random
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from recurrent_models import FEATURES, HIDDEN, STEPS, Body, LSTMLoop, PeepholeLoop, StackedLoop, data, fit, trainer
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel.callbacks import IntraStreamScheduling
from lightning_accel.callbacks.recurrent import intra_stream_scheduling
from lightning_accel.recurrent import PeepholeLSTMCell, Recurrent
from lightning_accel.recurrent.deferred import kernel
from lightning_accel.recurrent.instance_forward import InstanceForward


def warned(kind, callback, **settings):
    """Train; return the module and the callback's warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module = fit(kind, callback, **settings)
    return module, [str(w.message) for w in said if "IntraStreamScheduling" in str(w.message)]


def assert_trained_plainly(module, plain):
    assert module.losses == plain.losses
    for actual, expected in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_a_wrong_result_is_found_named_and_not_used(monkeypatch):
    run = kernel.Kernel.run

    def wrong(self, xs, states):
        outputs, last = run(self, xs, states)
        return [
            outputs[0] * torch.linspace(1, 1.1, len(outputs[0]), dtype=torch.double)[:, None, None],
            *outputs[1:],
        ], last

    monkeypatch.setattr(kernel.Kernel, "run", wrong)
    callback = IntraStreamScheduling("native")
    module, said = warned(LSTMLoop, callback)
    assert_trained_plainly(module, fit(LSTMLoop))
    assert len(said) == 1
    assert "runs `cell` plainly: the loss of a whole training step differs by" in said[0]
    assert callback.report == [f"cell: plain, {said[0].split('plainly: ')[1].rstrip('.')}"]


def test_a_wrong_gradient_is_found_and_named(monkeypatch):
    bring = kernel.Kernel.run

    def wrong(self, xs, states):
        outputs, last = bring(self, xs, states)
        return [o.detach() + 0.9 * (o - o.detach()) for o in outputs], last

    monkeypatch.setattr(kernel.Kernel, "run", wrong)
    module, said = warned(LSTMLoop, IntraStreamScheduling("intra_stream"))
    assert_trained_plainly(module, fit(LSTMLoop))
    assert "the gradient of `cell.weight_ih` in a whole training step differs by 1.0e-01" in said[0]


def test_an_exception_while_steps_are_computed_is_the_plain_loop(monkeypatch):
    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(kernel.Kernel, "run", fails)
    module, said = warned(LSTMLoop, IntraStreamScheduling("intra_stream"))
    assert_trained_plainly(module, fit(LSTMLoop))
    assert len(said) == 1
    assert "OSError while its steps were computed: no space left" in said[0]


def test_an_exception_after_the_comparison_is_the_plain_loop_from_then_on(monkeypatch):
    run, calls = kernel.Kernel.run, []

    def fails_later(self, *arguments):
        calls.append(1)
        if len(calls) > 2:
            raise OSError("no space left")
        return run(self, *arguments)

    monkeypatch.setattr(kernel.Kernel, "run", fails_later)
    module, said = warned(LSTMLoop, IntraStreamScheduling("intra_stream"))
    torch.testing.assert_close(module.losses, fit(LSTMLoop).losses, rtol=1e-10, atol=1e-12)
    assert len(said) == 1
    assert "`cell` plainly from now on: OSError" in said[0]


class Draws(LSTMLoop):
    """Looks at all random states, logs, counts and keeps things."""

    def build(self):
        super().build()
        self.drawn, self.steps, self.register = [], 0, self.register_buffer("seen", torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.seen += 1
        self.drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True)
        return loss


@pytest.mark.parametrize("fails", [False, True])
def test_a_comparison_leaves_nothing_behind(fails, monkeypatch, tmp_path):
    if fails:
        monkeypatch.setattr(kernel.Kernel, "run", lambda *_: 1 / 0)
    modules, rows = [], []
    for k, callbacks in enumerate(([], [IntraStreamScheduling("intra_stream")])):
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)
        module = Draws()
        logger = CSVLogger(tmp_path, name=str(k))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(*callbacks, logger=logger, log_every_n_steps=1).fit(module, data())
        logger.save()
        modules.append(module)
        rows.append(len((tmp_path / str(k) / "version_0" / "metrics.csv").read_text().splitlines()))
    plain, other = modules
    assert other.drawn == plain.drawn
    assert (other.steps, float(other.seen)) == (plain.steps, float(plain.seen)) == (6, 6.0)
    assert rows[0] == rows[1]
    torch.testing.assert_close(other.losses, plain.losses, rtol=1e-10, atol=1e-12)


def test_a_module_that_can_not_be_copied_runs_plain_and_says_so():
    class Holds(LSTMLoop):
        def build(self):
            super().build()
            self.stream = (k for k in range(10))

    callback = IntraStreamScheduling("intra_stream")
    module, said = warned(Holds, callback)
    assert_trained_plainly(module, fit(LSTMLoop))
    assert len(said) == 1
    assert "a training step can not be tried on a copy of the module: TypeError" in said[0]


def test_integers_of_any_length_are_compared():
    class Keeps(LSTMLoop):
        def build(self):
            super().build()
            self.seeds = [2**64 + 1, -(2**64), 2**2_000]

    callback = IntraStreamScheduling("intra_stream")
    module = fit(Keeps, callback)
    torch.testing.assert_close(module.losses, fit(Keeps).losses, rtol=1e-10, atol=1e-12)
    assert "chains of" in callback.report[0], callback.report


def test_what_can_not_be_compared_is_plain_training():
    class Keeps(LSTMLoop):
        def build(self):
            super().build()
            self.like = torch.empty(3, device="meta")

    module, said = warned(Keeps, IntraStreamScheduling("intra_stream"))
    assert_trained_plainly(module, fit(LSTMLoop))
    assert len(said) == 1
    assert "what a training step leaves can not be compared: " in said[0]


class Manual(LSTMLoop):
    """Manual optimization; ``update(module, loss)`` makes the updates of a step."""

    update = staticmethod(lambda module, loss: one_update(module, loss))

    def build(self):
        super().build()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        type(self).update(self, super().training_step(batch, batch_idx))


def one_update(module, loss):
    optimizer = module.optimizers()
    optimizer.zero_grad()
    module.manual_backward(loss)
    optimizer.step()


def a_closure(module, loss):
    def closure():
        module.optimizers().zero_grad()
        module.manual_backward(loss)
        return loss

    module.optimizers().step(closure=closure)


def toggled_and_clipped(module, loss):
    optimizer = module.optimizers()
    with optimizer.toggle_model():
        module.manual_backward(loss)
        module.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.optimizer.step()
    module.optimizers(use_pl_optimizer=False).zero_grad()


def with_a_scheduler(module, loss):
    one_update(module, loss)
    module.lr_schedulers().step()


UPDATES = {u.__name__: u for u in (one_update, a_closure, toggled_and_clipped, with_a_scheduler)}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_manual_optimization_is_compared_on_copies_and_then_gains(update):
    class Own(Manual):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]

    Own.update = staticmethod(update)
    callback = IntraStreamScheduling("intra_stream")
    module, plain = fit(Own, callback), fit(Own)
    assert len(module.losses) == len(plain.losses)
    torch.testing.assert_close(module.losses, plain.losses, rtol=1e-10, atol=1e-12)
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert "chains of" in callback.report[0], callback.report


def test_manual_optimization_without_schedulers_asks_for_none_of_them():
    def where_there_is_one(module, loss):
        one_update(module, loss)
        scheduler = module.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    class Own(Manual):
        update = staticmethod(where_there_is_one)

    callback = IntraStreamScheduling("intra_stream")
    module, plain = fit(Own, callback), fit(Own)
    torch.testing.assert_close(module.losses, plain.losses, rtol=1e-10, atol=1e-12)
    assert "chains of" in callback.report[0], callback.report


def test_manual_steps_that_would_come_out_otherwise_run_plain():
    def odd_update(module, loss):
        optimizer = module.optimizers()
        optimizer.zero_grad()
        module.manual_backward(loss * (2.0 if type(module.cell.forward) is InstanceForward else 1.0))
        optimizer.step()

    class Own(Manual):
        update = staticmethod(odd_update)

    callback = IntraStreamScheduling("intra_stream")
    _, said = warned(Own, callback)
    assert len(said) == 1
    assert "the gradient of `update 0: " in said[0]


def test_short_fits_run_plain_with_the_numbers():
    callback = IntraStreamScheduling()
    module = fit(PeepholeLoop, callback)
    assert_trained_plainly(module, fit(PeepholeLoop))
    assert "steps of" in callback.report[0]
    assert "to compare, trace and measure schedules takes about" in callback.report[0]
    assert "more than 3% of that" in callback.report[0]


def test_an_overhead_without_limit_measures_short_fits_too():
    callback = IntraStreamScheduling(max_overhead=float("inf"))
    module = fit(StackedLoop, callback)
    torch.testing.assert_close(module.losses, fit(StackedLoop).losses, rtol=1e-10, atol=1e-12)
    assert all("chains of" in line or "no schedule was faster" in line for line in callback.report), callback.report


class Endless(IterableDataset):
    """Batches without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        generator = torch.Generator().manual_seed(3)
        for _ in range(self.batches):
            yield torch.randn(4, STEPS, FEATURES, generator=generator, dtype=torch.double)


def fit_endless(kind, batches, *callbacks, **settings):
    module = kind()
    torch.manual_seed(5)
    trainer(*callbacks, **settings).fit(
        module, DataLoader(Endless(batches), batch_size=None, collate_fn=lambda x: (x,))
    )
    return module


def test_data_without_a_length_are_taken_to_go_on_as_long_as_they_did():
    callback = IntraStreamScheduling()
    module = fit_endless(PeepholeLoop, 12, callback)
    assert_trained_plainly(module, fit_endless(PeepholeLoop, 12))
    assert callback.report == ["cell: plain, its loops are not compared with the plain ones yet"]
    assert callback._ask_again == 32, "of 24 steps asked after 2, 4, 8 and 16"
    patient = IntraStreamScheduling(max_overhead=float("inf"))
    module = fit_endless(StackedLoop, 6, patient)
    torch.testing.assert_close(module.losses, fit_endless(StackedLoop, 6).losses, rtol=1e-10, atol=1e-12)
    assert all("chains of" in line or "no schedule was faster" in line for line in patient.report), patient.report


def test_a_report_and_a_state_can_be_asked_for_at_any_time():
    seen = []

    class Ask(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append((list(callback.report), callback.state_dict()))

    callback = IntraStreamScheduling("intra_stream")
    fit(LSTMLoop, Ask(), callback)
    assert seen[0][0][0].startswith("cell: plain"), "not compared yet"
    assert "chains of" in seen[-1][0][0]
    assert "chains of" in callback.report[0]
    assert seen[-1][1].keys() == callback.state_dict().keys()


class Annealed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inwards, self.around, self.gain = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN), 1.0

    def forward(self, x, h):
        return torch.tanh(self.inwards(x) + self.gain * self.around(h))


class Anneals(Body):
    until = 100

    def build(self):
        self.cell = Annealed()

    def on_train_batch_start(self, batch, batch_idx):
        self.cell.gain = 1.0 - 0.1 * min(self.global_step, self.until)

    def forward(self, x):
        h, hidden = x.new_zeros(x.shape[1], HIDDEN), []
        for t in range(len(x)):
            h = self.cell(x[t], h)
            hidden.append(h)
        return torch.stack(hidden)


@pytest.mark.parametrize("until", [100, 2])
def test_attributes_that_change_count(until):
    kind = type("Anneals", (Anneals,), {"until": until})
    callback = IntraStreamScheduling("intra_stream")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a schedule of the old value, where it is found
        module = fit(kind, callback, max_epochs=4)
    torch.testing.assert_close(module.losses, fit(kind, max_epochs=4).losses, rtol=1e-10, atol=1e-12)
    assert callback.report[0].startswith("cell: ")
    if until == 100:
        assert "plain" in callback.report[0]


def test_the_choice_is_said_once_when_it_is_made(caplog):
    class Noting(LSTMLoop):
        def on_train_batch_end(self, *_):
            self.said = [*getattr(self, "said", []), len([r for r in caplog.records if "IntraStream" in r.message])]

    with caplog.at_level("INFO"):
        module = fit(Noting, IntraStreamScheduling("intra_stream"))
    assert module.said[0] == 0
    assert module.said[-1] == 1


class WeightDrop(LSTMLoop):
    """Its recurrent weights are made anew in every step, past autograd."""

    def build(self):
        super().build()
        self.register_buffer("raw", self.cell.weight_hh.detach().clone())

    def forward(self, x):
        self.cell.weight_hh.data = self.raw * (torch.rand_like(self.raw) > 0.3)
        return super().forward(x)


def test_the_comparison_computes_with_the_weights_of_the_copy():
    callback = IntraStreamScheduling("native")
    module, plain = fit(WeightDrop, callback), fit(WeightDrop)
    torch.testing.assert_close(module.losses, plain.losses, rtol=1e-10, atol=1e-12)
    assert "chains of" in callback.report[0], callback.report


class RecurrentLayer(Body):
    def build(self):
        self.rnn, self.out = Recurrent(PeepholeLSTMCell(FEATURES, HIDDEN)), nn.Linear(HIDDEN, 1)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


class PackedLayer(Body):
    def build(self):
        self.rnn, self.out = nn.LSTM(FEATURES, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x):
        lengths = torch.arange(len(x), len(x) - x.shape[1], -1)
        y, _ = pad_packed_sequence(self.rnn(pack_padded_sequence(x, lengths))[0])
        return self.out(y)


@pytest.mark.parametrize("kind", [RecurrentLayer, PackedLayer])
def test_layers_that_compare_themselves_are_compared_in_a_whole_step_too(kind, monkeypatch):
    compared = []
    compare = intra_stream_scheduling.difference
    monkeypatch.setattr(
        intra_stream_scheduling,
        "difference",
        lambda trainer, module, batch, index, scheduled: (
            compared.append(index),
            compare(trainer, module, batch, index, scheduled),
        )[1],
    )
    callback = IntraStreamScheduling("intra_stream")
    module, plain = fit(kind, callback), fit(kind)
    assert compared == [0 if kind is RecurrentLayer else 1]
    assert "plain" not in callback.report[0]
    torch.testing.assert_close(module.losses, plain.losses, rtol=1e-10, atol=1e-12)


def is_scheduled(layer):
    if isinstance(layer, nn.LSTM):
        return type(layer.forward) is InstanceForward
    return any(choice.schedule != "loop" for choice in layer.schedules)


@pytest.mark.parametrize("kind", [RecurrentLayer, PackedLayer])
def test_layers_whose_whole_step_comes_out_otherwise_run_plain(kind):
    class Looks(kind):
        """Its loss says whether the layer is scheduled, which no comparison of single calls can see."""

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 2 if is_scheduled(self.rnn) and type(self.trainer.logger) is DummyLogger else loss

    callback = IntraStreamScheduling("intra_stream")
    module, said = warned(Looks, callback)
    torch.testing.assert_close(module.losses, fit(kind).losses, rtol=1e-10, atol=1e-12)
    assert len(said) == 1
    assert "runs `rnn` plainly: the loss of a whole training step differs" in said[0]
    assert callback.report == [f"rnn: plain, {said[0].split('plainly: ')[1].rstrip('.')}"]
