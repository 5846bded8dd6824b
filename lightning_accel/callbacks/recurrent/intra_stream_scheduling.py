"""Run recurrent layers with intra-stream schedules while training."""

# ruff: noqa: ARG002  # Lightning fixes the hooks' arguments

import math
import time
from collections import deque
from contextlib import ExitStack
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_accel.arguments import check_choice, check_number, check_switch
from lightning_accel.callbacks.recurrent.scheduled_layers import ScheduledLayers
from lightning_accel.callbacks.recurrent.whole_step_check import STEPS, difference
from lightning_accel.lightning_private import callbacks_of
from lightning_accel.lightning_private.decision_line import say_decision
from lightning_accel.recurrent.schedule_choice import SCHEDULES

_SECONDS_OF_A_CHOICE = 1.0  # what tracing, verifying and measuring the schedules of one cell takes
_TIMED = 5  # steps


class IntraStreamScheduling(Callback):
    """Run only the loops of recurrent layers step by step, in modules that know nothing of it.

    Acts on `Recurrent` and `GraphRNN` layers, on ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` that get packed sequences on
    CPU, and on Python loops over a cell in the model's own ``forward``. Parameters, state-dict keys and results stay;
    the model is as it was when the fit ends. The first training steps are watched and run plain. Before a loop over a
    cell is computed at its first call, a whole training step with it is compared with the plain one on copies of the
    module: loss, every parameter's gradient, what is logged and noted. What differs, fails or can not be tried runs
    plain, with one warning that names what was found. What was chosen is part of the checkpoint, so a resumed run
    repeats it.

    Args:
        schedule: ``"auto"`` measures; ``"loop"`` changes nothing; ``"intra_stream"``, ``"compiled"``, ``"scan"`` and
            ``"native"`` are used wherever they can be. A `Recurrent` layer's own schedule goes first.
        packed: Whether packed sequences run padded.
        deferred_cells: Whether Python loops over cells are computed at their first calls.
        max_overhead: Share of the remaining time that comparing and measuring may take with ``"auto"``, >= 0; where it
            would take more, loops over cells run plain.

    Attributes:
        report: One line for every recurrent layer: what runs how, and why. Up to date after every training step.

    Raises:
        TypeError: If ``packed`` or ``deferred_cells`` is not True or False.
        ValueError: If ``schedule`` is unknown.
        MisconfigurationException: When training starts, if the model has nothing that could be recurrent.

    References:
        Hwang, Sung, "Single Stream Parallelization of Generalized LSTM-like RNNs", arXiv:1503.02852. *Deviations*: see
        `lightning_accel.recurrent`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_accel import IntraStreamScheduling
        >>> from lightning_accel.zoo import CharLM, CopyTask
        >>> off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        >>> trainer = Trainer(max_epochs=1, limit_train_batches=4, accelerator="cpu", **dict.fromkeys(off, False),
        ...                   callbacks=[IntraStreamScheduling()])
        >>> trainer.fit(CharLM(embedding_dim=8, hidden_size=8), CopyTask(delay=5, batch_size=4))
    """

    def __init__(
        self,
        schedule: Literal["auto", "loop", "intra_stream", "compiled", "scan", "native"] = "auto",
        *,
        packed: bool = True,
        deferred_cells: bool = True,
        max_overhead: float = 0.03,
    ) -> None:
        super().__init__()
        check_choice("schedule", schedule, SCHEDULES)
        check_switch("packed", packed)
        check_switch("deferred_cells", deferred_cells)
        check_number("max_overhead", max_overhead, at_least=0.0, infinite=True)
        self.schedule: Literal["auto", "loop", "intra_stream", "compiled", "scan", "native"] = schedule
        self.packed, self.deferred_cells, self.max_overhead = packed, deferred_cells, float(max_overhead)
        self._report: list[str] = []
        self._ask_again = 0
        self._layers: ScheduledLayers | None = None
        self._step = ExitStack()
        self._saved: dict[str, Any] = {}
        self._resumed = False  # the next fit goes on with what was saved; another fit may have another model
        self._is_repeated = self._is_said = self._is_warm = False
        self._warned: set[str] = set()
        self._seconds: deque[float] = deque(maxlen=_TIMED)  # of steps, all but the first one, in which everything loads
        self._begun = 0.0

    @property
    def report(self) -> list[str]:
        """What runs how, a line a layer, so far; of the last fit when it is over."""
        return self._report if self._layers is None else self._layers.report()

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Attach the schedules; layers that were made late exist now."""
        self._leave()
        self._report, self._is_said, self._warned, self._ask_again = [], False, set(), 0
        self._is_warm, self._seconds = False, deque(maxlen=_TIMED)
        self._layers = ScheduledLayers(
            pl_module,
            schedule=self.schedule,
            packed=self.packed,
            deferred_cells=self.deferred_cells,
            calls_left=_batches_left(trainer),
            checked=self._affords_two_steps(trainer),
        )
        if not self._layers.may_find:
            self._leave()
            raise MisconfigurationException(_nothing_found(pl_module, "and no module of its own that could be a cell"))
        self._is_repeated = self._resumed and bool(self._saved)
        if self._resumed:
            self._layers.restore(self._saved)
        self._resumed = False

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Compare a whole step, once there is something to compare; then let the loops be computed in this one."""
        self._step.close()
        if self._layers is None:
            return
        if self._layers.layers_to_compare:
            self._compare_layers(trainer, pl_module, batch, batch_idx)
        if self._layers.to_compare:
            self._compare(trainer, pl_module, batch, batch_idx)
        self._step.enter_context(self._layers.training_step())
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        """Let the calls be as they were; say once what is known."""
        self._step.close()
        if self._layers is None:
            return
        if self._is_warm:
            self._seconds.append(time.perf_counter() - self._begun)
        self._is_warm = True
        self._warn_of_faults()
        if not self._is_said and not self._layers.to_compare and not self._layers.found_nothing:
            self._say(trainer)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Say what ran how and leave the model as it was."""
        if self._layers is not None:
            if self._layers.found_nothing and self.schedule != "loop":
                rank_zero_warn(_nothing_found(pl_module, "and no module was called in a loop with its own result"))
            self._say(trainer)
        self._leave()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Leave the model as it was."""
        self._leave()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Leave the model as it was."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Return what was chosen."""
        return dict(self._saved if self._layers is None else self._layers.state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Repeat what was chosen."""
        self._saved, self._resumed = dict(state_dict), bool(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the running fit."""
        kept = {"_saved": self.state_dict(), "_report": self.report}
        return self.__dict__ | kept | {"_layers": None, "_step": ExitStack()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntraStreamScheduling":
        """Copy the settings and what was chosen."""
        settings: dict[str, Any] = {"packed": self.packed, "deferred_cells": self.deferred_cells}
        twin = type(self)(self.schedule, **settings, max_overhead=self.max_overhead)
        twin._saved, twin._resumed = self.state_dict(), self._resumed
        return twin

    def _affords_two_steps(self, trainer: "pl.Trainer") -> bool:
        """Tell whether a comparison may cost its two steps, of layers that compare every kind of call by themselves."""
        return self.schedule != "auto" or _batches_left(trainer) * self.max_overhead >= STEPS

    def _compare_layers(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, index: int) -> None:
        """Compare a whole step with `Recurrent` and packed layers scheduled with the plain one."""
        assert self._layers is not None
        names = ", ".join(f"`{name}`" for name in self._layers.layers_to_compare)
        reason = difference(trainer, pl_module, batch, index, self._layers.layers_scheduled)
        if not _agree(trainer, reason is None):
            reason = reason or "another process found a difference"
            rank_zero_warn(f"IntraStreamScheduling runs {names} plainly: {reason}.")
        self._layers.decide_layers(reason)

    def _compare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int) -> None:
        """Compare a whole step with schedules with the plain one, if it is worth its time; leave plain what differs."""
        assert self._layers is not None
        if self.schedule == "auto" and not self._is_repeated:
            if not self._seconds:
                return
            if trainer.global_step < self._ask_again:
                return
            step, left = min(self._seconds), _batches_left(trainer)
            cost = STEPS * step + _SECONDS_OF_A_CHOICE * len(self._layers.to_compare)
            if not _agree(trainer, cost <= self.max_overhead * min(left * step, _seconds_left(trainer))):
                if trainer.estimated_stepping_batches < 0:  # nobody knows how long it goes on
                    self._ask_again = 2 * trainer.global_step
                    return
                self._layers.refuse(
                    f"{left:.0f} steps of {step:.2g} s remain, and to compare, trace and measure schedules takes "
                    f"about {cost:.1f} s, more than {self.max_overhead:.0%} of that"
                )
                return
            self._layers.expect(left)
        found = difference(trainer, pl_module, batch, batch_idx, self._layers.scheduled)
        if _agree(trainer, found is None):
            self._layers.confirm()
        else:
            reason = found or "another process found a difference"
            names = ", ".join(f"`{name}`" for name in self._layers.refuse(reason))
            rank_zero_warn(f"IntraStreamScheduling runs {names} plainly: {reason}.")

    def _warn_of_faults(self) -> None:
        cells = {} if self._layers is None or self._layers.deferred is None else self._layers.deferred.cells
        for name, cell in cells.items():
            if cell.is_fault and name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(f"IntraStreamScheduling runs `{name}` plainly from now on: {cell.reason}.")

    def _say(self, trainer: "pl.Trainer") -> None:
        if not self._is_said:
            self._is_said = True
            say_decision(trainer, "IntraStreamScheduling", "; ".join(self.report) or "no recurrent layer ran.")

    def _leave(self) -> None:
        self._step.close()
        if self._layers is not None:
            self._saved, self._report = self._layers.state(), self._layers.report()
            self._layers.remove()
            self._layers = None


def _batches_left(trainer: "pl.Trainer") -> float:
    """Return the steps to come; where the data have no length, as many as there have been."""
    planned = trainer.estimated_stepping_batches
    return trainer.global_step if planned < 0 else max(planned - trainer.global_step, 0)


def _seconds_left(trainer: "pl.Trainer") -> float:
    """Return how much of ``max_time`` remains."""
    timers = [callback for callback in callbacks_of(trainer) if isinstance(callback, Timer)]
    left = [seconds for timer in timers if (seconds := timer.time_remaining()) is not None]
    return min(left, default=math.inf)


def _agree(trainer: "pl.Trainer", answer: bool) -> bool:
    """Return whether all processes say yes: what one of them does, all must do."""
    return bool(trainer.strategy.reduce_boolean_decision(answer, all=True)) if trainer.world_size > 1 else answer


def _nothing_found(pl_module: "pl.LightningModule", why: str) -> str:
    return (
        f"IntraStreamScheduling found no recurrent layer in {type(pl_module).__name__}: no Recurrent, GraphRNN, "
        f"nn.LSTM, nn.GRU, nn.RNN or cell of these, {why}; remove the callback."
    )
