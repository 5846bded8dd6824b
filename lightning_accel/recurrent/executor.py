"""Run a staged step over a sequence: forward and backward block by block, as one differentiable function."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_accel.recurrent.generation import Generator, Wanted, compile_source, generalize
from lightning_accel.recurrent.staging import Stages, stage
from lightning_accel.recurrent.tracing import CannotSchedule, TensorSpec, trace_step

# Rows (streams times steps) of a block: enough for full speed of the products, few enough that what a block makes and
# uses again stays in the second-level cache.
_BLOCK_ROWS = 1024


class StepSchedule:
    """The intra-stream schedule of one step function, for one set of shapes but any batch size and length.

    Args:
        module: Owner of the parameters and buffers.
        step: ``step(module, xs, states) -> (ys, next_states)`` on lists of tensors of one time step.
        xs: One step's inputs; dimension 0 is the batch.
        states: One step's states; likewise.

    Raises:
        CannotSchedule: If the step can not be traced or staged; the message says why.

    References:
        Hwang, Sung, arXiv:1503.02852. *Deviations*: nodes are the tensor operations of a traced step and of its
        derivative instead of layers; loops of the derivative are found in the same way.
    """

    def __init__(
        self, module: nn.Module, step: Callable[..., Any], xs: Sequence[TensorSpec], states: Sequence[TensorSpec]
    ) -> None:
        self._module, self._step = module, step
        self._xs, self._states = list(xs), list(states)
        self._streams = xs[0].shape[0] if xs and xs[0].shape else 1
        self._device = xs[0].device
        self._variants: dict[tuple[Wanted, int | None], dict[str, Any]] = {}
        self._any_batch = True
        self._lock = threading.Lock()
        self.stages = self._stage(self._streams)
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

    def code(self, wanted: Wanted, streams: int) -> dict[str, Any]:
        """Return the compiled functions for a variant; writes them the first time."""
        with self._lock:
            if self._any_batch and (wanted, None) not in self._variants:
                self._write_for_any_batch(wanted)
            key = (wanted, None) if self._any_batch else (wanted, streams)
            if key not in self._variants:
                stages = self._stage(streams)
                self._variants[key] = self._compile(Generator(stages, wanted), None, stages)
            functions = self._variants[key]
            functions["B"] = streams
            return functions

    def source(self, wanted: Wanted) -> str:
        """Return the text of a variant, for people."""
        return Generator(self._stage(self._streams), wanted).source()

    def _write_for_any_batch(self, wanted: Wanted) -> None:
        texts = []
        for streams in (5, 3):
            stages = self._stage(streams)
            generator = Generator(stages, wanted)
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
        xs = [s.with_batch(streams, self._streams) for s in self._xs]
        states = [s.with_batch(streams, self._streams) for s in self._states]
        return stage(trace_step(self._module, self._step, xs, states))


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, schedule: StepSchedule, wanted: Wanted, nx: int, ns: int, *tensors: Tensor) -> Any:
        xs, states, weights = list(tensors[:nx]), list(tensors[nx : nx + ns]), list(tensors[nx + ns :])
        steps, streams = xs[0].shape[0], xs[0].shape[1] if xs[0].dim() > 1 else 1
        code = schedule.code(wanted, streams)
        with torch.autocast(xs[0].device.type, enabled=False):
            inv = code["forward_constants"](weights)
            slabs = code["make_slabs"](steps)
            bounds, ws = states, {}
            for begin, end in _blocks(steps, streams):
                block = {k: v[begin : end + (k.startswith("state_"))] for k, v in slabs.items()}
                if end - begin != ws.get("n"):
                    ws = {"n": end - begin}
                bounds = code["forward"](end - begin, [x[begin:end] for x in xs], bounds, inv, block, ws)
        ctx.schedule, ctx.wanted, ctx.counts = schedule, wanted, (nx, ns, len(code["places"]))
        ys = [_output(place, slabs, code, weights, steps, keep=wanted.any) for place in code["places"]]
        if wanted.any:
            ctx.slab_names = list(slabs)
            ctx.save_for_backward(*tensors, *slabs.values())
        results = (*ys, *(b.clone() for b in bounds))
        ctx.mark_non_differentiable(*(r for r in results if not r.dtype.is_floating_point))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        nx, ns, ny = ctx.counts
        tensors = ctx.saved_tensors
        inputs, slabs = tensors[: len(tensors) - len(ctx.slab_names)], tensors[len(tensors) - len(ctx.slab_names) :]
        saved = dict(zip(ctx.slab_names, slabs, strict=True))
        xs, weights = inputs[:nx], inputs[nx + ns :]
        steps, streams = xs[0].shape[0], xs[0].shape[1] if xs[0].dim() > 1 else 1
        code = ctx.schedule.code(ctx.wanted, streams)
        dys, bounds = gradients[:ny], list(gradients[ny:])
        sums: list[Tensor | None] = [None] * len(weights)
        with torch.autocast(xs[0].device.type, enabled=False):
            inv = code["backward_constants"](weights)
            made = code["make_gradient_slabs"](steps)
            ws: dict[str, Any] = {}
            for begin, end in reversed(_blocks(steps, streams)):
                block = {k: v[begin : end + (k.startswith("state_"))] for k, v in saved.items()}
                out = {k: v[begin:end] for k, v in made.items()}
                if end - begin != ws.get("n"):
                    ws = {"n": end - begin}
                bounds = code["backward"](
                    end - begin,
                    [x[begin:end] for x in xs],
                    inv,
                    block,
                    [None if d is None else d[begin:end] for d in dys],
                    bounds,
                    out,
                    ws,
                    sums,
                )
        d_xs: list[Tensor | None] = [None] * nx
        for k, name in code["GRADIENT_PLACES"]:
            d_xs[k] = torch.zeros_like(xs[k]) if name is None else made[name]
        return None, None, None, None, *d_xs, *(None if b is None else b.clone() for b in bounds), *sums


def _blocks(steps: int, streams: int) -> list[tuple[int, int]]:
    """Cut the time into blocks of equal length, a shorter one last."""
    length = max(1, min(steps, -(-_BLOCK_ROWS // streams)))
    return [(begin, min(begin + length, steps)) for begin in range(0, steps, length)]


def _output(
    place: tuple[str, str], slabs: dict[str, Tensor], code: dict[str, Any], weights: list[Tensor], steps: int, *, keep: bool
) -> Tensor:
    kind, name = place
    if kind == "constant":
        raise CannotSchedule(f"the output {name!r} does not depend on the input.")
    value = slabs[name][1:] if kind == "state" else slabs[name]
    # what the backward reads must not be in the caller's hands, who may change it in place
    return value.clone() if keep else value
