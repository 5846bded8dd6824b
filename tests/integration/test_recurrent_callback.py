"""IntraStreamScheduling in real fits of unchanged modules: same losses, same keys, nothing left behind."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recurrent_errors import relative_errors
from recurrent_models import (
    MLP,
    EncoderDecoder,
    GRULoop,
    HandWrittenLoop,
    LSTMLoop,
    OwnOutput,
    PackedLSTM,
    PeepholeLoop,
    RecurrentLayer,
    StackedLoop,
    data,
    fit,
    trainer,
)

from lightning_accel.callbacks import IntraStreamScheduling

LOOPS = [LSTMLoop, GRULoop, StackedLoop, PeepholeLoop, HandWrittenLoop, EncoderDecoder]


@pytest.mark.parametrize("schedule", ["auto", "intra_stream", "native"])
@pytest.mark.parametrize("kind", [*LOOPS, OwnOutput, PackedLSTM, RecurrentLayer])
def test_an_unchanged_module_has_the_same_losses_and_gradients(kind, schedule):
    if schedule == "native" and kind in (PeepholeLoop, HandWrittenLoop, RecurrentLayer):
        schedule = "intra_stream"
    plain = fit(kind)
    callback = IntraStreamScheduling(schedule)
    module = fit(kind, callback)
    torch.testing.assert_close(module.losses, plain.losses, rtol=1e-10, atol=1e-12)
    for actual, expected in zip(module.gradients, plain.gradients, strict=True):
        errors = relative_errors(actual, expected)
        assert max(errors.values()) <= 1e-10, errors
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
    assert "may use every step's result before the next step" in callback.report[0]


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


def test_nothing_to_act_on_is_an_error_before_the_first_step():
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
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(IntraStreamScheduling("native")).fit(module, data())
    assert "forward" not in module.cell.__dict__


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="`schedule` must be one of"):
        IntraStreamScheduling("fast")
