"""Choose a schedule: compared with the plain loop, then measured on the real shapes, once for each kind of call."""

import copy
import math
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_accel.machine.c_functions import refusal as no_compiler
from lightning_accel.machine.c_functions import start_check
from lightning_accel.machine.toolchain import compile_budget
from lightning_accel.measure import time_interleaved
from lightning_accel.recurrent.cell_step import CellStep, Step, run_loop
from lightning_accel.recurrent.compiler.emit_triton.triton_code import triton_refusal
from lightning_accel.recurrent.exactness.assumptions import Assumptions, assumptions_of, first_change
from lightning_accel.recurrent.exactness.plain_modes import plain_reason
from lightning_accel.recurrent.exactness.private_copy import private_copy
from lightning_accel.recurrent.exactness.verification import Run
from lightning_accel.recurrent.verified_schedules import VerifiedSchedules

Schedule = Literal["auto", "loop", "intra_stream", "compiled", "scan", "native"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

TRIAL_STEPS = 48  # enough for the time of a step to show, few enough that the choice costs less than a batch
_TRIAL_ROUNDS = 3
_COMPILE_SECONDS = 1.0  # what a cell's machine code costs once: text, compiler, verification
_KERNEL_SECONDS = 8.0  # the same of Triton, for which four kernels are compiled, two of them in float64
_COMPILED_SAVES = 0.3  # at least this share of the best time without it, as measured of all cells here
# A trace costs as much as some tens of sequences. A cell that changes more often than that is not traced again.
_CALLS_THAT_PAY = 50
_MOST_TRACES = 6

Results = tuple[list[Tensor], list[Tensor]]


class ScheduleChoice:
    """Run one module's sequences with the best schedule, or with the plain loop and one warning that says why.

    A schedule is used only while everything holds that it was traced under, see `Assumptions`, and only for kinds of
    calls (batch size, precision, gradients) on which it was compared with the plain loop. Threads may call it at the
    same time.

    Args:
        module: The cell.
        schedule: ``"auto"`` measures; another name is used wherever it can be.
        name: Of the cell, for messages.

    Attributes:
        choices: Schedule chosen for each kind of call, as text; can be saved and given to another run, which then
            repeats the choice instead of measuring anew.
        speed: Measured times faster than the loop, for each kind of call that was measured.
        refusals: Why a schedule could not be used.
        calls_left: How many calls of a kind are to come; machine code is made only if they pay for it.

    Raises:
        ValueError: If ``schedule`` is none of the names.
    """

    def __init__(self, module: nn.Module, schedule: Schedule = "auto", *, name: str = "cell") -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {SCHEDULES}, got {schedule!r}.")
        self.module, self.schedule, self.name = module, schedule, name
        self.choices: dict[str, str] = {}
        self.speed: dict[str, float] = {}
        self.calls_left = math.inf
        self._forget()

    def for_copy(self, module: nn.Module) -> "ScheduleChoice":
        """Return a choice for a copy of the module that traces and measures nothing again: it asks this one."""
        twin = ScheduleChoice(module, self.schedule, name=self.name)
        twin._asked = self._asked
        twin.choices, twin.speed, twin.refusals = self.choices, self.speed, self.refusals
        twin.calls_left = self.calls_left
        return twin

    def _forget(self) -> None:
        self._asked = self
        self.refusals: dict[str, str] = {}
        self._lock = threading.RLock()
        self._traced: dict[tuple[Any, ...], VerifiedSchedules] = {}
        self._latest: Assumptions | None = None
        self._said: set[Hashable] = set()
        self._steps: dict[CellStep, CellStep] = {}

    def run(self, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> Results:
        """Run a sequence.

        Args:
            step: One step; equal steps (by ``==``) share schedules.
            xs: Each of shape (T, B, ...), T >= 1.
            states: Each of shape (B, ...).

        Returns:
            Outputs, each of shape (T, B, ...), and final states.
        """
        if self.schedule == "loop" or torch.compiler.is_compiling():
            return run_loop(step, self.module, xs, states)
        run, notes = self._asked._run_of(step, xs, states)
        for about, text in notes:
            self._say(about, text)
        if run is None:
            return run_loop(step, self.module, xs, states)
        try:
            return run(self.module, xs, states)
        except Exception as error:
            results = run_loop(step, self.module, xs, states)  # raises what the user's own code raises
            reason = f"its schedule failed: {type(error).__name__}: {error}"
            with self._lock:
                for schedules in self._asked._traced.values():
                    schedules.give_up(reason)
            self._say(reason, f"runs the plain loop: {reason}")
            return results

    def runner(self, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> Run:
        """Return what `run` would call, for a module that is given: to measure it beside something else."""
        found = None if self.schedule == "loop" else self._asked._run_of(step, xs, states)[0]
        return found or (lambda module, xs, states: run_loop(step, module, xs, states))

    def _run_of(
        self, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]
    ) -> tuple[Run | None, list[tuple[Hashable, str]]]:
        """Return what runs this call, ``None`` for the plain loop, and what there is to say about it."""
        notes: list[tuple[Hashable, str]] = []
        reason = plain_reason(xs, states)
        if reason is not None:
            return None, [(reason, f"runs the plain loop: {reason}")]
        try:
            with self._lock, compile_budget():
                return self._find(step, xs, states, notes), notes
        except Exception as error:  # whatever went wrong, the loop is right
            reason = f"{type(error).__name__}: {error}"
            return None, [*notes, (reason, f"runs the plain loop: {reason}")]

    def known_step(self, step: CellStep) -> CellStep:
        """Return the equal step that was used before, which knows how results nest although no call of it runs."""
        return self._asked._steps.setdefault(step, step)

    def refusal(self, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> str | None:
        """Return why a step (``xs`` of shape (B, ...)) has no intra-stream schedule; ``None`` if it has one."""
        if self._asked is not self:
            return self._asked.refusal(step, xs, states)
        sequences = [x[None] for x in xs]
        try:
            reason = plain_reason(sequences, states)
            if reason is not None:
                return reason
            with self._lock:
                schedules, doubt = self._schedules(assumptions_of(self.module))
                if schedules is None:
                    return doubt
                found = schedules.find("intra_stream", step, sequences, states)
            return None if found is not None else schedules.refusals["intra_stream"]
        except Exception as error:  # a cell of which nothing is known runs plainly
            return f"{type(error).__name__}: {error}"

    def _find(
        self, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor], notes: list[tuple[Hashable, str]]
    ) -> Run | None:
        schedules, doubt = self._schedules(assumptions_of(self.module))
        if schedules is None:
            notes.append((doubt, f"runs the plain loop: {doubt}"))
            return None
        schedules.calls += 1
        if xs[0].device.type == "cpu" and self.schedule in ("auto", "compiled"):
            start_check()
        key = kind_of_call(step, xs, states)
        if key not in self.choices:
            self.choices[key] = self._choose(key, schedules, (step, xs, states), notes)
        chosen = self.choices[key]
        if chosen == "loop":
            return None
        run = schedules.find(chosen, step, xs, states)
        if run is None and chosen == "compiled":  # chosen on a machine that has a compiler
            notes += _no_compiler(xs[0])
            chosen = "intra_stream"
            run = schedules.find(chosen, step, xs, states)
        for name, refusal in schedules.refusals.items():
            self.refusals.setdefault(name, refusal)
        if run is None:
            why = schedules.refusals.get(chosen, "it has no such form")
            notes.append(((chosen, why), f"runs the plain loop: {why}"))
        return run

    def _schedules(self, now: Assumptions) -> tuple[VerifiedSchedules | None, str]:
        """Return the schedules that were traced under these assumptions, or why there can be none."""
        if now.doubt is not None:
            return None, now.doubt
        if now.key in self._traced:
            self._latest = now
            return self._traced[now.key], ""
        if self._latest is not None:
            often = sum(1 for s in self._traced.values() if s.calls < _CALLS_THAT_PAY)
            if often >= _MOST_TRACES:
                return None, f"{first_change(self.module, self._latest)} changes too often to trace the cell anew"
        while len(self._traced) >= _MOST_TRACES:
            oldest = next(iter(self._traced))
            del self._traced[oldest]
        made = VerifiedSchedules(self.module, reads_sizes=now.reads_sizes, held=now.held)
        self._traced[now.key], self._latest = made, now
        return made, ""

    def _choose(
        self,
        key: str,
        schedules: VerifiedSchedules,
        call: tuple[Step, Sequence[Tensor], Sequence[Tensor]],
        notes: list[tuple[Hashable, str]],
    ) -> str:
        step, xs, states = call
        if self.schedule != "auto":
            if schedules.find(self.schedule, step, xs, states) is None:
                reason = self.refusals[self.schedule] = schedules.refusals.get(self.schedule, "it has no such form")
                notes.append((reason, f"runs the plain loop, not {self.schedule!r}: {reason}"))
                return "loop"
            return self.schedule
        candidates = {n: schedules.find(n, step, xs, states) for n in ("native", "intra_stream", "scan")}
        found: dict[str, Run] = {n: run for n, run in candidates.items() if run is not None}
        if "intra_stream" not in found:
            reason = self.refusals["intra_stream"] = schedules.refusals["intra_stream"]
            if "native" not in found:
                notes.append((reason, f"runs the plain loop: {reason}"))
        if not found:
            return "loop"
        found["loop"] = lambda module, xs, states: run_loop(step, module, xs, states)
        steps = min(len(xs[0]), TRIAL_STEPS)
        short = [x[:steps].detach() for x in xs]
        start = [s.detach() for s in states]
        medians = self._measure(schedules, found, short, start)
        saved = self.calls_left * _COMPILED_SAVES * min(medians.values()) * len(xs[0]) / steps
        cost = _COMPILE_SECONDS if xs[0].device.type == "cpu" else _KERNEL_SECONDS
        if saved > cost and "intra_stream" in found:
            compiled = schedules.find("compiled", step, xs, states)
            if compiled is None:
                notes += _no_compiler(xs[0])
            else:
                best = min(medians, key=medians.__getitem__)
                trials = {n: found[n] for n in ("loop", best)} | {"compiled": compiled}
                medians = self._measure(schedules, trials, short, start)
        best = min(medians, key=medians.__getitem__)
        self.speed[key] = medians["loop"] / max(medians[best], 1e-9)
        return best

    def _measure(
        self, schedules: VerifiedSchedules, candidates: dict[str, Run], xs: list[Tensor], states: list[Tensor]
    ) -> dict[str, float]:
        medians = measured_seconds(candidates, self.module, xs, states)
        schedules.release()  # what the trials left is of another length, or of a schedule that loses
        return medians

    def _say(self, about: Hashable, text: str) -> None:
        """Say something once."""
        said = _said if about in _SAID_ONCE_A_PROCESS else self._said
        if about not in said:
            said.add(about)
            warnings.warn(f"{self.name} {text}", stacklevel=4)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScheduleChoice":
        """Copy the settings; what was compiled belongs to the module it was compiled for."""
        twin = ScheduleChoice(copy.deepcopy(self.module, memo), self.schedule, name=self.name)
        twin.choices, twin.speed = dict(self.choices), dict(self.speed)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can not be pickled and is made again."""
        kept = ("module", "schedule", "name", "choices", "speed", "calls_left")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the settings."""
        self.__dict__.update(state)
        self._forget()


_SAID_ONCE_A_PROCESS = frozenset({"no machine code"})
_said: set[Hashable] = set()


def _no_compiler(x: Tensor) -> list[tuple[Hashable, str]]:
    """Return what to say where machine code was wanted and there is no compiler that works."""
    reason = no_compiler() if x.device.type == "cpu" else triton_refusal()
    if reason is None:
        return []
    return [("no machine code", f"runs without machine code, slower but with the same results: {reason}")]


def measured_seconds(
    candidates: dict[str, Run], module: nn.Module, xs: list[Tensor], states: list[Tensor]
) -> dict[str, float]:
    """Return the median time of a forward and backward of each candidate, on a copy of the module."""
    twin = private_copy(module)  # no hook on a parameter is to see the trials
    trials = {n: _trial(run, twin, xs, states) for n, run in candidates.items()}
    clock = _clock(xs[0].device)
    seconds = time_interleaved(trials, rounds=_TRIAL_ROUNDS, device=xs[0].device, clock=clock, budget_seconds=2.0)
    return {n: sorted(s)[len(s) // 2] for n, s in seconds.items()}


def _trial(run: Run, module: nn.Module, xs: list[Tensor], states: list[Tensor]) -> Callable[[], None]:
    parameters = [p for p in module.parameters() if p.requires_grad]

    def trial() -> None:
        ys, last = run(module, xs, states)
        total = sum(r.float().sum() for r in (*ys, *last) if r.dtype.is_floating_point)
        if isinstance(total, Tensor) and total.requires_grad and parameters:
            torch.autograd.grad(total, parameters, allow_unused=True)

    return trial


def kind_of_call(step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> str:
    """Describe a kind of call; lengths and batch sizes count by powers of two."""
    device = xs[0].device.type
    cast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "no autocast"
    size = f"T~{_power_of_two(xs[0].shape[0])} B~{_power_of_two(xs[0].shape[1])}"
    shapes = "; ".join(f"{tuple(x.shape[2:])} {x.dtype}" for x in xs)
    mode = "train" if torch.is_grad_enabled() else "no grad"
    return f"{type(step).__name__}: {shapes}, {len(states)} states, {size}, {cast}, {device}, {mode}"


def _power_of_two(value: int) -> int:
    return 2 ** round(math.log2(max(value, 1)))


def _clock(device: torch.device) -> Callable[[], float]:
    """Take processor time on CPU, which other programs disturb less."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
