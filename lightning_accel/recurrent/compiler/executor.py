"""Run a staged step over a sequence: forward and backward block by block, as one differentiable function."""

import gc
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_accel.machine_code.c_functions import refusal
from lightning_accel.recurrent.cell_step import run_loop
from lightning_accel.recurrent.compiler.compile_source import compile_source, generalize
from lightning_accel.recurrent.compiler.emit_python import Generator, Wanted
from lightning_accel.recurrent.compiler.scan_lowering import is_affine
from lightning_accel.recurrent.compiler.stage import Stages, rewrite, stage
from lightning_accel.recurrent.compiler.trace import CannotScheduleError, StepGraph, TensorSpec, as_function, trace_step

# Rows (streams times steps) of a block: enough for full speed of the products, few enough that what a block makes and
# uses again stays in the second-level cache.
_BLOCK_ROWS = 256
_SCAN_ROWS = 4096  # scans gain from longer blocks
_SPARES = 6
_EXAMPLE_STREAMS = (3, 5)  # numbers of streams whose texts are compared, see `generalize`


class StepSchedule:
    """The intra-stream schedule of one step function, for one set of shapes but any batch size and length.

    Args:
        module: Owner of the parameters and buffers.
        step: ``step(module, xs, states) -> (ys, next_states)`` on lists of tensors of one time step.
        xs: One step's inputs; dimension 0 is the batch.
        states: One step's states; likewise.
        scan: Whether loops that are elementwise and affine in one state become scans; one at least has to be.
        compiled: Whether loops that can be written in C run as machine code; one at least has to.

    Raises:
        CannotScheduleError: If the step can not be traced or staged; the message says why.

    References:
        Hwang, Sung, arXiv:1503.02852. *Deviations*: nodes are the tensor operations of a traced step and of its
        derivative instead of layers; loops of the derivative are found in the same way.
    """

    def __init__(
        self,
        module: nn.Module,
        step: Callable[..., Any],
        xs: Sequence[TensorSpec],
        states: Sequence[TensorSpec],
        *,
        scan: bool = False,
        compiled: bool = False,
    ) -> None:
        self.scan, self.compiled = scan, compiled
        self._module, self._step = module, step
        self._xs, self._states = list(xs), list(states)
        self._streams = xs[0].shape[0] if xs and xs[0].shape else 1
        self._device = xs[0].device
        self._variants: dict[tuple[Wanted, int | None], dict[str, Any]] = {}
        self._any_batch = True
        self._lock = threading.Lock()
        self._spare: dict[Hashable, Any] = {}
        self._steps: dict[int, StepGraph] = {}
        self.stages = self._stage(_EXAMPLE_STREAMS[0])
        if scan:
            self._find_scans()
        if compiled:
            reason = "there is no C form for another device than the CPU" if self._device.type != "cpu" else refusal()
            if reason is not None:
                raise CannotScheduleError(f"no machine code: {reason}.")
        self.weight_names = [n for n, _ in module.named_parameters()] + [n for n, _ in module.named_buffers()]

    def __call__(
        self, xs: Sequence[Tensor], states: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the sequence.

        Args:
            xs: Each of shape (T, B, ...).
            states: Each of shape (B, ...).
            weights: Parameters, then buffers, in the order of ``weight_names``.

        Returns:
            Outputs, each of shape (T, B, ...), and final states.
        """
        tensors = [*xs, *states, *weights]
        grad = torch.is_grad_enabled()
        needs = [grad and t.requires_grad for t in tensors]
        nx, ns = len(xs), len(states)
        wanted = Wanted(tuple(needs[:nx]), tuple(needs[nx + ns :]), any(needs))
        results = _Run.apply(self, wanted, nx, ns, *tensors)
        ny = self.stages.step.counts[3]
        return list(results[:ny]), list(results[ny:])

    def run_plainly(
        self, xs: Sequence[Tensor], states: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the plain loop with the given weights in the module's place."""
        stepper, named = as_function(self._module, self._step, weights)

        def step(_: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            ys, following = functional_call(stepper, named, (list(xs), list(states)))
            return list(ys), list(following)

        return run_loop(step, self._module, xs, states)

    def code(self, wanted: Wanted, streams: int) -> dict[str, Any]:
        """Return the compiled functions for a variant; writes them the first time."""
        with self._lock:
            if self._any_batch and (wanted, None) not in self._variants:
                self._write_for_any_batch(wanted)
            key = (wanted, None) if self._any_batch else (wanted, streams)
            if key not in self._variants:
                stages = self._stage(streams)
                self._variants[key] = self._compile(
                    Generator(stages, wanted, scan=self.scan, compiled=self.compiled), None, stages
                )
            functions = self._variants[key]
            functions["B"] = streams
            return functions

    def take(self, key: Hashable) -> Any:
        """Take memory that an earlier call left, or ``None``: fresh pages cost more than what is done in them."""
        with self._lock:
            return self._spare.pop(key, None)

    def leave(self, key: Hashable, memory: Any) -> None:
        """Leave memory for a later call; the oldest of more than a few goes."""
        with self._lock:
            self._spare[key] = memory
            while len(self._spare) > _SPARES:
                del self._spare[next(iter(self._spare))]

    def release(self) -> None:
        """Give back the memory that calls left; the next one takes fresh pages."""
        with self._lock:
            self._spare.clear()

    def source(self, wanted: Wanted) -> str:
        """Return the text of a variant, for people."""
        return Generator(self._stage(_EXAMPLE_STREAMS[0]), wanted, scan=self.scan, compiled=self.compiled).source()

    def _find_scans(self) -> None:
        loops = [s for s in self.stages.forward if s.loop]
        if not loops or not all(is_affine(s.nodes, self.stages.step.states) for s in loops):
            raise CannotScheduleError("no scan: the recurrence is not elementwise and affine in one state.")

    def _write_for_any_batch(self, wanted: Wanted) -> None:
        texts = []
        for streams in reversed(_EXAMPLE_STREAMS):
            stages = self._stage(streams)
            generator = Generator(stages, wanted, scan=self.scan, compiled=self.compiled)
            texts.append(generator.source())
        general = generalize(texts[1], texts[0])
        if general is None:
            self._any_batch = False
            return
        self._variants[wanted, None] = self._compile(generator, general, stages)

    def _compile(self, generator: Generator, source: str | None, stages: Stages) -> dict[str, Any]:
        text = generator.source() if source is None else source
        functions = compile_source(text, stages.step.constants, self._device, self._streams)
        functions["places"] = generator.output_names()
        return functions

    def _stage(self, streams: int) -> Stages:
        if streams not in self._steps:
            xs = [s.with_batch(streams, self._streams) for s in self._xs]
            states = [s.with_batch(streams, self._streams) for s in self._states]
            self._steps[streams] = trace_step(self._module, self._step, xs, states)
            rewrite(self._steps[streams])
        return stage(self._steps[streams])


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, schedule: StepSchedule, wanted: Wanted, nx: int, ns: int, *tensors: Tensor) -> Any:
        xs, states, weights = list(tensors[:nx]), list(tensors[nx : nx + ns]), list(tensors[nx + ns :])
        steps, streams = xs[0].shape[0], xs[0].shape[1] if xs[0].dim() > 1 else 1
        code = schedule.code(wanted, streams)
        key = (wanted, "slabs", steps, streams) if wanted.any else None
        with torch.autocast(xs[0].device.type, enabled=False), _collector_paused():
            inv = code["forward_constants"](weights)
            slabs = schedule.take(key) if key else None
            if slabs is None:
                slabs = code["make_slabs"](steps)
            bounds = states
            for begin, end, ws in _blocks(schedule, "forward", wanted, steps, streams):
                block = _cut(slabs, begin, end)
                bounds = code["forward"](end - begin, [x[begin:end] for x in xs], bounds, inv, block, ws)
            ys = [_output(place, slabs, keep=wanted.any) for place in code["places"]]
            results = (*ys, *(b.clone() for b in bounds))
        if wanted.any:
            ctx.schedule, ctx.wanted, ctx.counts = schedule, wanted, (nx, ns, len(ys))
            ctx.slab_names, ctx.slab_key = list(slabs), key
            ctx.save_for_backward(*tensors, *slabs.values())
        ctx.mark_non_differentiable(*(r for r in results if not r.dtype.is_floating_point))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, gradients)
        nx, ns, ny = ctx.counts
        schedule, wanted, tensors = ctx.schedule, ctx.wanted, ctx.saved_tensors
        inputs, slabs = tensors[: len(tensors) - len(ctx.slab_names)], tensors[len(tensors) - len(ctx.slab_names) :]
        saved = dict(zip(ctx.slab_names, slabs, strict=True))
        xs, weights = inputs[:nx], list(inputs[nx + ns :])
        steps, streams = xs[0].shape[0], xs[0].shape[1] if xs[0].dim() > 1 else 1
        code = schedule.code(wanted, streams)
        dys, bounds = gradients[:ny], list(gradients[ny:])
        sums: list[Tensor | None] = [None] * len(weights)
        with torch.autocast(xs[0].device.type, enabled=False), _collector_paused():
            inv = code["backward_constants"](weights)
            made = code["make_gradient_slabs"](steps)
            for begin, end, ws in _blocks(schedule, "backward", wanted, steps, streams):
                bounds = code["backward"](
                    end - begin,
                    [x[begin:end] for x in xs],
                    inv,
                    _cut(saved, begin, end),
                    [None if d is None else d[begin:end] for d in dys],
                    bounds,
                    _cut(made, begin, end),
                    ws,
                    sums,
                )
            ends = [None if b is None else b.clone() for b in bounds]
        if not _graph_is_kept():
            # The graph gives its saved tensors free after this call; nobody else has seen them.
            schedule.leave(ctx.slab_key, {name: slab.detach() for name, slab in saved.items()})
        d_xs: list[Tensor | None] = [None] * nx
        for k, name in code["GRADIENT_PLACES"]:
            d_xs[k] = torch.zeros_like(xs[k]) if name is None else made[name]
        return None, None, None, None, *d_xs, *ends, *sums


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep Python's cycle collector from walking the whole heap because of thousands of views that go by themselves."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _differentiable_backward(ctx: Any, gradients: Sequence[Tensor]) -> Any:
    """Compute gradients that can be differentiated again, through the plain loop: slow, but rarely asked for."""
    nx, ns, _ = ctx.counts
    inputs = ctx.saved_tensors[: len(ctx.saved_tensors) - len(ctx.slab_names)]
    ys, last = ctx.schedule.run_plainly(inputs[:nx], inputs[nx : nx + ns], inputs[nx + ns :])
    results = [(r, g) for r, g in zip((*ys, *last), gradients, strict=True) if r.requires_grad]
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(
        torch.autograd.grad(
            [r for r, _ in results], wanted, [g for _, g in results], create_graph=True, allow_unused=True
        )
    )
    return None, None, None, None, *(next(found) if t.requires_grad else None for t in inputs)


def _graph_is_kept() -> bool:
    """Tell whether the running backward was called with ``retain_graph``; if torch can not say, it may have been."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _cut(slabs: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    """Cut a block out of what covers all time steps; states have one entry more."""
    return {k: v[begin : end + k.startswith("state_")] for k, v in slabs.items()}


def _blocks(
    schedule: StepSchedule, phase: str, wanted: Wanted, steps: int, streams: int
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (begin, end, buffers) of blocks of equal length, a shorter one last; the backward starts at the end."""
    length = max(1, min(steps, -(-(_SCAN_ROWS if schedule.scan else _BLOCK_ROWS) // streams)))
    cuts = [(begin, min(begin + length, steps)) for begin in range(0, steps, length)]
    key = (wanted, phase, length, streams, torch.is_inference_mode_enabled())
    buffers = schedule.take(key) or {}
    for begin, end in cuts if phase == "forward" else reversed(cuts):
        yield begin, end, buffers if end - begin == length else {}
    schedule.leave(key, buffers)


def _output(place: tuple[str, str], slabs: dict[str, Tensor], *, keep: bool) -> Tensor:
    kind, name = place
    if kind == "constant":
        raise CannotScheduleError(f"the output {name!r} does not depend on the input.")
    value = slabs[name][1:] if kind == "state" else slabs[name]
    # what the backward reads must not be in the caller's hands, who may change it in place
    return value.clone() if keep else value
