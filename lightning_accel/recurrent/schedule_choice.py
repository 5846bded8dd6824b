"""Choose a schedule: verified against the plain loop, then measured on the real shapes, once for each kind of call."""

import copy
import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_accel.machine_code.c_functions import refusal as no_compiler
from lightning_accel.measure import time_interleaved
from lightning_accel.recurrent.cell_step import Step, is_torch_cell, run_loop, run_native, torch_cell_step
from lightning_accel.recurrent.compiler.executor import StepSchedule
from lightning_accel.recurrent.compiler.trace import CannotScheduleError, TensorSpec

Schedule = Literal["auto", "loop", "intra_stream", "compiled", "scan", "native"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

_TRIAL_STEPS = 48  # enough for the time of a step to show, few enough that the choice costs less than a batch
_TRIAL_ROUNDS = 3
_COMPILE_SECONDS = 1.0  # what a cell's machine code costs once: text, compiler, verification
_COMPILED_SAVES = 0.3  # at least this share of the best time without it, as measured of all cells here
_TOLERANCE = 1e-9  # of the float64 comparison with the loop, relative to the largest value


class ScheduleChoice:
    """Run one module's sequences with the best schedule.

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
        self.refusals: dict[str, str] = {}
        self.calls_left = math.inf
        self._made: dict[tuple[Any, ...], StepSchedule | None] = {}

    def run(self, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Run a sequence.

        Args:
            step: One step; equal steps (by ``==``) share schedules.
            xs: Each of shape (T, B, ...), T >= 1.
            states: Each of shape (B, ...).

        Returns:
            Outputs, each of shape (T, B, ...), and final states.
        """
        key = self._key(step, xs, states)
        if key not in self.choices:
            self.choices[key] = self._choose(key, step, xs, states)
        chosen = self.choices[key]
        run = self._candidates(step, xs, states, only=chosen).get(chosen)
        if run is None and chosen == "compiled":  # chosen on a machine that has a compiler
            run = self._candidates(step, xs, states, only="intra_stream").get("intra_stream")
        return run(xs, states) if run is not None else run_loop(step, self.module, xs, states)

    def refusal(self, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> str | None:
        """Return why a step (``xs`` of shape (B, ...)) has no intra-stream schedule; ``None`` if it has one."""
        before, self.schedule = self.schedule, "intra_stream"  # asked, not wanted: no warning
        try:
            made = self._schedule("intra_stream", step, [x[None] for x in xs], states)
        finally:
            self.schedule = before
        return None if made is not None else self.refusals["intra_stream"]

    def _key(self, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> str:
        """Describe a kind of call; lengths and batch sizes count by powers of two."""
        device = xs[0].device.type
        cast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "no autocast"
        size = f"T~{_power_of_two(xs[0].shape[0])} B~{_power_of_two(xs[0].shape[1])}"
        shapes = "; ".join(f"{tuple(x.shape[2:])} {x.dtype}" for x in xs)
        mode = "train" if torch.is_grad_enabled() else "no grad"
        return f"{type(step).__name__}: {shapes}, {len(states)} states, {size}, {cast}, {device}, {mode}"

    def _choose(self, key: str, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> str:
        wanted = None if self.schedule == "auto" else self.schedule
        candidates = self._candidates(step, xs, states, only=wanted)
        if self.schedule != "auto":
            if self.schedule not in candidates:
                reason = self.refusals.get(self.schedule, "this cell has no such form")
                warnings.warn(f"{self.name} runs the plain loop, not {self.schedule!r}: {reason}", stacklevel=4)
                return "loop"
            return self.schedule
        if len(candidates) == 1:
            return "loop"
        steps = min(len(xs[0]), _TRIAL_STEPS)
        short = [x[:steps].detach() for x in xs]
        start = [s.detach() for s in states]
        medians = self._measure(candidates, short, start)
        saved = self.calls_left * _COMPILED_SAVES * min(medians.values()) * len(xs[0]) / steps
        if saved > _COMPILE_SECONDS and "intra_stream" in candidates:
            compiled = self._candidates(step, xs, states, only="compiled")
            if compiled:
                best = min(medians, key=medians.__getitem__)
                medians = self._measure({n: candidates[n] for n in {"loop", best}} | compiled, short, start)
        best = min(medians, key=medians.__getitem__)
        self.speed[key] = medians["loop"] / max(medians[best], 1e-9)
        return best

    def _measure(
        self, candidates: dict[str, Callable[..., Any]], xs: list[Tensor], states: list[Tensor]
    ) -> dict[str, float]:
        trials = {n: self._trial(run, xs, states) for n, run in candidates.items()}
        clock = _clock(xs[0].device)
        seconds = time_interleaved(trials, rounds=_TRIAL_ROUNDS, device=xs[0].device, clock=clock, budget_seconds=2.0)
        for schedule in self._made.values():
            if schedule is not None:
                schedule.release()  # what the trials left is of another length, or of a schedule that loses
        return {n: sorted(s)[len(s) // 2] for n, s in seconds.items()}

    def _trial(self, run: Callable[..., Any], xs: list[Tensor], states: list[Tensor]) -> Callable[[], None]:
        parameters = [p for p in self.module.parameters() if p.requires_grad]

        def trial() -> None:
            ys, last = run(xs, states)
            total = sum(r.float().sum() for r in (*ys, *last) if r.dtype.is_floating_point)
            if isinstance(total, Tensor) and total.requires_grad and parameters:
                torch.autograd.grad(total, parameters, allow_unused=True)

        return trial

    def _candidates(
        self, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor], *, only: str | None
    ) -> dict[str, Callable[..., Any]]:
        found: dict[str, Callable[..., Any]] = {}
        if only in (None, "loop"):
            found["loop"] = lambda xs, states: run_loop(step, self.module, xs, states)
        if only in (None, "native") and step is torch_cell_step and is_torch_cell(self.module):
            found["native"] = lambda xs, states: run_native(self.module, xs, states)
        for name in ("intra_stream", "scan", "compiled"):
            if only == name or (only is None and name != "compiled"):  # machine code has to pay for its compiler
                schedule = self._schedule(name, step, xs, states)
                if schedule is not None:
                    found[name] = _bind(schedule, self.module)
        return found

    def _schedule(self, name: str, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> StepSchedule | None:
        device = xs[0].device
        specs = tuple(TensorSpec.of(x[0]).with_batch(2, x.shape[1]) for x in xs)
        state_specs = tuple(TensorSpec.of(s).with_batch(2, xs[0].shape[1]) for s in states)
        modes = tuple(m.training for m in self.module.modules())
        dtypes = tuple(p.dtype for p in self.module.parameters())
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (name, step, specs, state_specs, modes, dtypes, cast)
        if key not in self._made:
            try:
                with torch.inference_mode(mode=False):  # what is traced and kept serves training as well
                    self._made[key] = self._make(name, step, specs, state_specs)
            except CannotScheduleError as refusal:
                self._made[key] = None
                self.refusals.setdefault(name, str(refusal))
                if name == "intra_stream" and self.schedule == "auto":
                    warnings.warn(f"{self.name} runs without an intra-stream schedule: {refusal}", stacklevel=6)
                if name == "compiled" and self.schedule == "auto" and xs[0].device.type == "cpu" and no_compiler():
                    _say_once(f"schedules run without machine code, slower but with the same results: {no_compiler()}")
        return self._made[key]

    def _make(self, name: str, step: Step, xs: tuple[TensorSpec, ...], states: tuple[TensorSpec, ...]) -> StepSchedule:
        scan, compiled = name == "scan", name == "compiled"
        schedule = StepSchedule(self.module, step, xs, states, scan=scan, compiled=compiled)
        with torch.autocast(xs[0].device.type, enabled=False):
            double = copy.deepcopy(self.module).double()
            wide_xs, wide_states = ([_doubled(s) for s in specs] for specs in (xs, states))
            twin = StepSchedule(double, step, wide_xs, wide_states, scan=scan, compiled=compiled)
            verify(twin, double, step, wide_xs, wide_states)
        return schedule

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScheduleChoice":
        """Copy the settings; what was compiled belongs to the module it was compiled for."""
        twin = ScheduleChoice(copy.deepcopy(self.module, memo), self.schedule, name=self.name)
        twin.choices, twin.speed = dict(self.choices), dict(self.speed)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can not be pickled and is made again."""
        return self.__dict__ | {"_made": {}}


def verify(
    schedule: StepSchedule, module: nn.Module, step: Step, xs: Sequence[TensorSpec], states: Sequence[TensorSpec]
) -> None:
    """Compare outputs, final states and all gradients with the plain loop's, in float64.

    Raises:
        CannotScheduleError: If they differ by more than 1e-9 of the largest value.
    """
    generator = torch.Generator().manual_seed(1)
    steps = 4
    inputs = [torch.stack([s.example(generator) for _ in range(steps)]) for s in xs]
    start = [s.example(generator) for s in states]
    leaves = [t.requires_grad_() for t in (*inputs, *start) if t.dtype.is_floating_point]
    leaves += [p for p in module.parameters() if p.requires_grad]
    tensors = [*module.parameters(), *module.buffers()]
    results = []
    with torch.enable_grad():
        for run in (lambda: run_loop(step, module, inputs, start), lambda: schedule(inputs, start, tensors)):
            ys, last = run()
            smooth = [r for r in (*ys, *last) if r.requires_grad]
            if smooth and leaves:
                total = sum((k + 1.0) * r.cos().sum() for k, r in enumerate(smooth))
                gradients = torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
            else:
                gradients = ()
            zeros = [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, leaves, strict=False)]
            results.append([*ys, *last, *zeros])
    for expected, actual in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        error = (expected.double() - actual.double()).abs().max().item() / scale if expected.numel() else 0.0
        if not error <= _TOLERANCE:
            raise CannotScheduleError(
                f"its result differs from the plain loop's by {error:.1e}; please report this cell."
            )


@functools.cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=8)


def _bind(schedule: StepSchedule, module: nn.Module) -> Callable[..., Any]:
    def run(xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return schedule(xs, states, [*module.parameters(), *module.buffers()])

    return run


def _doubled(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.shape, torch.float64 if spec.dtype.is_floating_point else spec.dtype, spec.device)


def _power_of_two(value: int) -> int:
    return 2 ** round(math.log2(max(value, 1)))


def _clock(device: torch.device) -> Callable[[], float]:
    """Take processor time on CPU, which other programs disturb less."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
