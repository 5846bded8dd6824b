"""Run a schedule over a sequence, forward and backward block by block, as one differentiable function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_accel import torch_private
from lightning_accel.recurrent.compiler.captured_blocks import CAPTURED_STEPS
from lightning_accel.recurrent.compiler.emit_python.generator import Wanted
from lightning_accel.recurrent.compiler.trace import CannotScheduleError, Dependencies
from lightning_accel.recurrent.compiler.workspace import SpareWorkspaces, Workspace

# Rows (streams times steps) of a block: enough for full speed of the products, few enough that what a block makes and
# uses again stays in the second-level cache. Narrow cells get more: a block costs the same Python whatever its length.
_BLOCK_ROWS = 256
_BLOCK_NUMBERS = 1 << 18  # of the widest value of a step
_SCAN_ROWS = 4096  # scans gain from longer blocks, and nothing has longer ones
_DEVICE_ROWS = 65536  # a device is filled by long blocks only, and has no second-level cache that they had to fit


class BlockSchedule(Protocol):
    """What a sequence is run by.

    Attributes:
        scan: Whether its loops are scans.
        block_steps: Steps of a block; ``None`` for as many as fit the cache.
        widest: Numbers a stream of the widest value of a step.
        device: Of its tensors.
        captured: Whether blocks of steps are recorded as CUDA graphs.
        spares: Memory that earlier calls left.
    """

    scan: bool
    block_steps: int | None
    widest: int
    device: torch.device
    captured: bool
    spares: SpareWorkspaces

    def code(self, wanted: Wanted, streams: int) -> dict[str, Any]:
        """Return the compiled functions for a variant."""

    def run_plainly(
        self, xs: Sequence[Tensor], states: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the plain loop; see `StepSchedule.run_plainly`."""

    def fail(self, reason: str) -> None:
        """Note that a backward had to run plainly."""


class RunSequence(torch.autograd.Function):
    """A whole sequence as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, schedule: BlockSchedule, wanted: Wanted, nx: int, ns: int, *tensors: Tensor) -> Any:
        """Compute outputs and final states; what the backward reads stays in a workspace of its own."""
        xs, states, weights = list(tensors[:nx]), list(tensors[nx : nx + ns]), list(tensors[nx + ns :])
        steps, streams = xs[0].shape[:2]
        code = schedule.code(wanted, streams)
        kind = (wanted, "slabs", False)
        with torch.autocast(xs[0].device.type, enabled=False):
            inv = code["forward_constants"](weights, streams)
            kept = schedule.spares.take(kind if wanted.any else None)
            slabs = code["make_slabs"](steps, streams, kept)
            bounds = states
            for begin, end, ws in _blocks(schedule, "forward", wanted, steps, streams):
                block = _block_of(slabs, begin, end)
                inputs = [_part(x, begin, end) for x in xs]
                bounds = code["forward"](end - begin, streams, inputs, bounds, inv, block, ws)
            results = (*_outputs(code["places"], slabs, keep=wanted.any), *(b.clone() for b in bounds))
        ny = len(results) - ns
        if wanted.any:
            ctx.schedule, ctx.wanted, ctx.counts = schedule, wanted, (nx, ns, ny)
            ctx.slab_names, ctx.kept, ctx.kind = list(slabs), kept, kind
            ctx.save_for_backward(*tensors, *slabs.values())
            ctx.like = [(r.shape, r.dtype, r.device) for r in results]
            ctx.set_materialize_grads(False)
        needs = [t.requires_grad for t in tensors] if wanted.any else []
        ys_need, states_need = _needing(code["dependencies"], needs, (nx, ns, ny), steps)
        ctx.mark_non_differentiable(*(r for r, need in zip(results, (*ys_need, *states_need), strict=True) if not need))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Compute all wanted gradients; ``None`` where the plain loop has none."""
        if torch.is_grad_enabled():
            return _plain_backward(ctx, gradients, create_graph=True)
        tensors = ctx.saved_tensors
        try:
            found = _scheduled_backward(ctx, tensors, gradients)
        except Exception as error:
            ctx.schedule.fail(f"its backward failed: {type(error).__name__}: {error}")
            return _plain_backward(ctx, gradients, create_graph=False)
        if not torch_private.backward_keeps_graph():
            # The graph gives its saved tensors free after this call; nobody else has seen them.
            ctx.schedule.spares.leave(ctx.kind, ctx.kept)
        return found


def _scheduled_backward(ctx: Any, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Any:
    nx, ns, ny = ctx.counts
    schedule, wanted = ctx.schedule, ctx.wanted
    inputs, slabs = tensors[: len(tensors) - len(ctx.slab_names)], tensors[len(tensors) - len(ctx.slab_names) :]
    saved = dict(zip(ctx.slab_names, slabs, strict=True))
    xs, weights = inputs[:nx], list(inputs[nx + ns :])
    steps, streams = xs[0].shape[:2]
    code = schedule.code(wanted, streams)
    given = [
        torch.zeros((1, *shape[1:]), dtype=dtype, device=device).expand(shape) if g is None else g
        for g, (shape, dtype, device) in zip(gradients, ctx.like, strict=True)
    ]  # absent ones are one step's zeros, or for states one stream's: nobody writes to them
    dys, bounds = given[:ny], given[ny:]
    sums: list[Tensor | None] = [None] * len(weights)
    with torch.autocast(xs[0].device.type, enabled=False):
        inv = code["backward_constants"](weights, streams)
        made = code["make_gradient_slabs"](steps, streams)
        for begin, end, ws in _blocks(schedule, "backward", wanted, steps, streams):
            bounds = code["backward"](
                end - begin,
                streams,
                [_part(x, begin, end) for x in xs],
                inv,
                _block_of(saved, begin, end),
                [_part(d, begin, end) for d in dys],
                bounds,
                _block_of(made, begin, end),
                ws,
                sums,
            )
        ends = [None if b is None else b.clone() for b in bounds]
    d_xs: list[Tensor | None] = [None] * nx
    for k, name in code["GRADIENT_PLACES"]:
        d_xs[k] = torch.zeros_like(xs[k]) if name is None else made[name]
    present = [g is not None for g in gradients]
    reached = _reached(code["dependencies"], present[:ny], present[ny:], steps)
    return (
        *(None,) * 4,
        *(g if k in reached[0] else None for k, g in enumerate(d_xs)),
        *(g if k in reached[1] else None for k, g in enumerate(ends)),
        *(g if k in reached[2] else None for k, g in enumerate(sums)),
    )


def _plain_backward(ctx: Any, gradients: Sequence[Tensor | None], *, create_graph: bool) -> Any:
    """Compute gradients through the plain loop: slow, but they can be differentiated again, and nothing is assumed."""
    nx, ns, _ = ctx.counts
    saved = ctx.saved_tensors
    inputs = saved[: len(saved) - len(ctx.slab_names)]
    with torch.enable_grad():
        if not create_graph:
            inputs = tuple(t.detach().requires_grad_(t.requires_grad) for t in inputs)
        ys, last = ctx.schedule.run_plainly(inputs[:nx], inputs[nx : nx + ns], inputs[nx + ns :])
        results = [(r, g) for r, g in zip((*ys, *last), gradients, strict=True) if r.requires_grad and g is not None]
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in results], wanted, [g for _, g in results], create_graph=create_graph, allow_unused=True
            )
            if results
            else [None] * len(wanted)
        )
    return *(None,) * 4, *(next(found) if t.requires_grad else None for t in inputs)


def _needing(
    dependencies: Dependencies, needs: Sequence[bool], counts: tuple[int, int, int], steps: int
) -> tuple[list[bool], list[bool]]:
    """Tell which outputs and final states depend on something that wants a gradient."""
    nx, ns, ny = counts
    if not needs:
        return [False] * ny, [False] * ns
    wants_x, wants_w = ({k for k, n in enumerate(part) if n} for part in (needs[:nx], needs[nx + ns :]))
    states = {k for k, n in enumerate(needs[nx : nx + ns]) if n}
    ys: set[int] = set()

    def live(of: tuple[frozenset[int], frozenset[int], frozenset[int]]) -> bool:
        return not (wants_x.isdisjoint(of[0]) and states.isdisjoint(of[1]) and wants_w.isdisjoint(of[2]))

    for _ in range(steps):
        ys |= {k for k, of in enumerate(dependencies.of_ys) if live(of)}
        following = {k for k, of in enumerate(dependencies.of_states) if live(of)}
        if following == states:
            break
        states = following
    return [k in ys for k in range(ny)], [k in states for k in range(ns)]


def _reached(
    dependencies: Dependencies, ys: Sequence[bool], states: Sequence[bool], steps: int
) -> tuple[set[int], set[int], set[int]]:
    """Return the places of inputs, initial states and weights to which gradients of some results lead."""
    xs: set[int] = set()
    weights: set[int] = set()
    live = {k for k, given in enumerate(states) if given}
    of_ys = [of for of, given in zip(dependencies.of_ys, ys, strict=True) if given]
    for _ in range(steps):
        sources = [*of_ys, *(dependencies.of_states[k] for k in live)]
        before: set[int] = set()
        for of_xs, of_states, of_weights in sources:
            xs |= of_xs
            before |= of_states
            weights |= of_weights
        if before == live:
            break
        live = before
    return xs, live, weights


def _block_of(slabs: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    """Cut a block out of what covers all time steps; states have one entry more."""
    return {k: _part(v, begin, end + k.startswith("state_")) for k, v in slabs.items()}


def _part(x: Tensor, begin: int, end: int) -> Tensor:
    return x if begin == 0 and end == x.shape[0] else x[begin:end]


def _blocks(
    schedule: BlockSchedule, phase: str, wanted: Wanted, steps: int, streams: int
) -> Iterator[tuple[int, int, Workspace]]:
    """Yield (begin, end, buffers) of blocks of equal length, a shorter one last; the backward starts at the end."""
    rows = _SCAN_ROWS if schedule.scan else max(_BLOCK_ROWS, min(_BLOCK_NUMBERS // schedule.widest, _SCAN_ROWS))
    fitting = -(-(rows if schedule.device.type == "cpu" else _DEVICE_ROWS) // streams)
    fitting = CAPTURED_STEPS if schedule.captured else fitting
    length = max(1, min(steps, schedule.block_steps or fitting))
    ranges = [(begin, min(begin + length, steps)) for begin in range(0, steps, length)]
    kind = (wanted, phase, torch.is_inference_mode_enabled())
    workspace = schedule.spares.take(kind)
    for begin, end in ranges if phase == "forward" else reversed(ranges):
        yield begin, end, workspace
    schedule.spares.leave(kind, workspace)


def _outputs(places: Sequence[tuple[str, str]], slabs: dict[str, Tensor], *, keep: bool) -> list[Tensor]:
    """Return the outputs; none of them shares memory with another or with what the backward reads."""
    found: list[Tensor] = []
    taken: set[str] = set()
    for kind, name in places:
        if kind == "constant":
            raise CannotScheduleError(f"the output {name!r} does not depend on the input.")
        value = slabs[name][1:] if kind == "state" else slabs[name]
        # the caller may change it in place
        found.append(value.clone() if keep or name in taken else value)
        taken.add(name)
    return found
