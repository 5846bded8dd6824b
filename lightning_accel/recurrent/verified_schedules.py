"""The schedules of one cell as it is now, each compared with the plain loop before it runs a kind of call."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.machine.toolchain import compiling_for_comparison
from lightning_accel.recurrent.cell_step import Step, is_native, run_native, torch_cell_step
from lightning_accel.recurrent.compiler.executor import EXAMPLE_STREAMS, StepSchedule
from lightning_accel.recurrent.compiler.trace import CannotScheduleError, StepGraph, TensorSpec
from lightning_accel.recurrent.exactness.private_copy import private_copy
from lightning_accel.recurrent.exactness.verification import Run, verify_call, verify_in_float64

_MOST_COMPARED = 64  # kinds of calls, batch sizes among them


class VerifiedSchedules:
    """Schedules of one module under one set of assumptions.

    Args:
        module: The cell.
        reads_sizes: Whether a step of it may branch on the number of streams.
        held: Objects by whose identity the assumptions hold.

    Attributes:
        refusals: Why a schedule could not be used.
        calls: How often one was asked for.
    """

    def __init__(self, module: nn.Module, *, reads_sizes: bool, held: tuple[Any, ...] = ()) -> None:
        self._module, self._reads_sizes, self._held = module, reads_sizes, held
        self._made: dict[Hashable, StepSchedule | None] = {}
        self._compared: dict[Hashable, bool] = {}
        self._traces: dict[Hashable, dict[int, StepGraph]] = {}
        self.refusals: dict[str, str] = {}
        self.calls = 0

    @property
    def made(self) -> dict[Hashable, StepSchedule | None]:
        """Schedules that were traced; ``None`` for those that could not be."""
        return self._made

    def find(self, name: str, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> Run | None:
        """Return what runs a call by the schedule ``name``; ``None``, and a reason in ``refusals``, if nothing may."""
        if name == "native":
            if step is not torch_cell_step or not is_native(self._module):
                return None
            run: Run = run_native
        else:
            schedule = self._schedule(name, step, xs, states)
            if schedule is None:
                return None
            if schedule.failure is not None:
                self.refusals[name] = schedule.failure
                return None
            run = _bind(schedule)
        key = (name, *_kind(step, xs, states), _wanted(xs, states), torch.is_grad_enabled())
        if key not in self._compared:
            if len(self._compared) >= _MOST_COMPARED:
                self._compared.clear()
            self._compared[key] = self._agrees(name, run, step, xs, states)
        return run if self._compared[key] else None

    def release(self) -> None:
        """Give back the memory that calls left."""
        for schedule in self._made.values():
            if schedule is not None:
                schedule.release()

    def give_up(self, reason: str) -> None:
        """Use none of the schedules any more."""
        self._made = dict.fromkeys(self._made)
        self._compared = dict.fromkeys(self._compared, False)
        self.refusals.update(dict.fromkeys(("native", "intra_stream", "compiled", "scan"), reason))

    def _agrees(self, name: str, run: Run, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> bool:
        try:
            gradients = torch.is_grad_enabled()
            with torch.inference_mode(mode=False), torch.set_grad_enabled(gradients):
                verify_call(run, self._module, step, xs, states)
        except Exception as error:
            self.refusals[name] = _text(error)
            return False
        return True

    def _schedule(self, name: str, step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> StepSchedule | None:
        few, streams = EXAMPLE_STREAMS[0], xs[0].shape[1]
        specs = tuple(TensorSpec.of(x[0]).with_batch(few, streams) for x in xs)
        state_specs = tuple(TensorSpec.of(s).with_batch(few, streams) for s in states)
        kind = (step, specs, state_specs, _precision(xs[0].device.type))
        if (name, kind) not in self._made:
            try:
                with torch.inference_mode(mode=False):  # what is traced and kept serves training as well
                    self._made[name, kind] = self._make(name, kind, step, specs, state_specs)
            except Exception as error:
                self._made[name, kind] = None
                self.refusals[name] = _text(error)
        return self._made[name, kind]

    def _make(
        self, name: str, kind: Hashable, step: Step, xs: tuple[TensorSpec, ...], states: tuple[TensorSpec, ...]
    ) -> StepSchedule:
        schedule = self._traced(self._module, name, kind, (step, xs, states))
        with torch.autocast(xs[0].device.type, enabled=False), compiling_for_comparison():
            double = private_copy(self._module).double()
            wide_xs, wide_states = ([_doubled(s) for s in specs] for specs in (xs, states))
            twin = self._traced(double, name, ("double", kind), (step, wide_xs, wide_states))
            twin.for_any_batch, twin.block_steps = False, 2  # so that the borders of blocks are compared too
            verify_in_float64(_bind(twin), double, step, wide_xs, wide_states)
        if twin.failure is not None:
            raise CannotScheduleError(twin.failure)
        return schedule

    def _traced(
        self,
        module: nn.Module,
        name: str,
        kind: Hashable,
        signature: tuple[Step, Sequence[TensorSpec], Sequence[TensorSpec]],
    ) -> StepSchedule:
        return StepSchedule(
            module,
            *signature,
            scan=name == "scan",
            compiled=name == "compiled",
            reads_sizes=self._reads_sizes,
            traces=self._traces.setdefault(kind, {}),
        )


def _bind(schedule: StepSchedule) -> Run:
    def run(module: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return schedule(xs, states, [*module.parameters(), *module.buffers()])

    return run


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, CannotScheduleError) else f"{type(error).__name__}: {error}"


def _precision(device: str) -> Hashable:
    """Return what decides the types of numbers that a step makes."""
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return cast, torch.get_default_dtype()


def _kind(step: Step, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """Describe a call up to its length."""
    shapes = tuple((tuple(x.shape[1:]), x.dtype, x.device) for x in xs)
    return step, shapes, tuple((tuple(s.shape), s.dtype, s.device) for s in states), _precision(xs[0].device.type)


def _wanted(xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[bool, ...]:
    return tuple(t.requires_grad for t in (*xs, *states))


def _doubled(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.shape, torch.float64 if spec.dtype.is_floating_point else spec.dtype, spec.device)
