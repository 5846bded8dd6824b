"""Defer the calls of one cell: what to record, when a chain goes on, and when it does not pay."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.recurrent.cell_step import is_torch_cell, run_loop, torch_cell_step
from lightning_accel.recurrent.deferred.call_layout import CallLayout, flatten, unflatten
from lightning_accel.recurrent.deferred.deferred_tensor import Chain, DeferredTensor, spec_of
from lightning_accel.recurrent.instance_forward import InstanceForward
from lightning_accel.recurrent.schedule_choice import ScheduleChoice

_SHORT = 4  # a chain of fewer steps is not worth a schedule
_PATIENCE = 8  # short chains in a row until the cell runs plain for the rest of the batch
_BATCHES = 3  # such batches in a row until it does for good; a profiler looks at every step of single batches only

_TORCH_LAYOUTS = {
    "lstm": CallLayout(
        ("tuple", ("tuple", None, ("tuple", None, None)), ("dict", ())),
        (0,),
        (1, 2),
        (0, 1),
        (),
        ("tuple", None, None),
        (0, 1),
    ),
    "single": CallLayout(("tuple", ("tuple", None, None), ("dict", ())), (0,), (1,), (0,), (), None, (0,)),
}


class DeferredCell:
    """Stand before one cell's ``forward``; defer calls while ``active`` and gradients are on.

    Args:
        cell: The module.
        layout: Form of its calls; torch's own cells need none.
        choice: Runs the chains.
        shapes: For each result, shape without the batch, for cells that are not torch's.

    Attributes:
        active: Whether calls are deferred now.
        reason: Why they are not any more; empty while they are.
    """

    def __init__(
        self,
        cell: nn.Module,
        choice: ScheduleChoice,
        layout: CallLayout | None = None,
        shapes: Sequence[tuple[int, ...]] = (),
    ) -> None:
        self.cell, self.choice = cell, choice
        self.native = is_torch_cell(cell)
        if self.native:
            layout = _TORCH_LAYOUTS["lstm" if isinstance(cell, nn.LSTMCell) else "single"]
            assert isinstance(cell, (nn.LSTMCell, nn.GRUCell, nn.RNNCell))
            shapes = [(cell.hidden_size,)] * len(set(layout.unique))
        assert layout is not None
        self.layout = layout
        self.shapes = list(shapes)
        self._parameters = [*cell.parameters(), *cell.buffers()]
        self._short = self._short_batches = 0
        self.active = False
        self.reason = ""
        self.chains = self.steps = 0
        self._forward = InstanceForward(cell, self._call)

    def remove(self, reason: str = "") -> None:
        """Give the cell its own forward back."""
        self.active, self.reason = False, reason or self.reason
        self._forward.remove()

    def choose(self, args: tuple[Any, ...], kwargs: dict[str, Any], steps: int) -> None:
        """Choose now how chains of ``steps`` calls like this one run, which else their first run does."""
        found = self._read(args, kwargs)
        if found is None or not self._fits(*found):
            return
        xs, states = ([t.detach() for t in group] for group in found)
        self._run([x.expand(steps, *x.shape).contiguous() for x in xs], states)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._forward.original(*args, **kwargs)
        found = self._read(args, kwargs)
        if found is None:
            return self._forward.original(*args, **kwargs)
        xs, states = found
        chain = self._running_chain(xs, states)
        if chain is None:
            if not self._fits(xs, states):
                return self._forward.original(*args, **kwargs)
            like = [(torch.Size((xs[0].shape[0], *shape)), states[0].dtype, states[0].device) for shape in self.shapes]
            chain = Chain(
                self._run,
                states,
                self.layout.state_slots,
                self._parameters,
                like=like,
                run_inner=self._run_inner,
                ended=self._ended,
            )
            chain.x_specs = [spec_of(x) for x in xs]
        step = chain.append(xs)
        made = [DeferredTensor.make(chain, step, slot) for slot in range(len(self.shapes))]
        if self.native:
            return tuple(made) if len(made) > 1 else made[0]
        return unflatten(self.layout.results, iter([made[slot] for slot in self.layout.unique]))

    def _read(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        if self.native:
            if kwargs and (len(kwargs) != 1 or "hx" not in kwargs):
                return None
            if not args:
                return None
            x, hx = args[0], args[1] if len(args) > 1 else kwargs.get("hx")
            if hx is None:
                if x.dim() != 2:
                    return None
                hx = x.new_zeros(x.shape[0], self.shapes[0][0])
                return (x,), (hx,) * len(self.layout.state_places)
            return (x,), tuple(hx) if isinstance(self.cell, nn.LSTMCell) else (hx,)
        leaves: list[Any] = []
        if flatten((args, kwargs), leaves) != self.layout.arguments:
            return None
        return self.layout.split(leaves)

    def _fits(self, xs: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> bool:
        streams, dtype = xs[0].shape[0], states[0].dtype
        if any(t.dim() < 2 for t in (*xs, *states)):
            return False
        if self.cell._backward_hooks or self.cell._backward_pre_hooks:
            return False
        for state, slot in zip(states, self.layout.state_slots, strict=True):
            if state.shape != (streams, *self.shapes[slot]) or state.dtype != dtype:
                return False
        device = xs[0].device.type
        # autocast changes the type of what a step returns; the kernels would return another one
        return not torch.is_autocast_enabled(device) and all(x.shape[0] == streams for x in xs)

    def _running_chain(self, xs: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> Chain | None:
        first = states[0]
        if not isinstance(first, DeferredTensor):
            return None
        chain = first.chain
        if chain.parameters is not self._parameters or chain.evaluated or first.step != len(chain.inputs) - 1:
            return None
        for state, slot in zip(states, self.layout.state_slots, strict=True):
            if not isinstance(state, DeferredTensor) or state.chain is not chain or state.step != first.step:
                return None
            if state.slot != slot or state.changed is not None:
                return None
        if any(spec_of(x) != spec for x, spec in zip(xs, chain.x_specs, strict=True)):
            return None
        if torch.is_autocast_enabled(chain.like[0][2].type) or chain.would_wait_for_itself(xs):
            return None
        return chain

    def _run(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        step = torch_cell_step if self.native else self.layout
        if len(xs[0]) < _SHORT:
            ys, last = run_loop(step, self.cell, xs, states)
        else:
            ys, last = self.choice.run(step, xs, states)
        outputs: list[Tensor | None] = list(ys)
        return outputs + [None] * (len(self.shapes) - len(ys)), last

    def _run_inner(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if not self.native or self.choice.schedule == "native":
            return run_loop(self.layout, self.cell, xs, states)
        return self.choice.run(self.layout, xs, states)

    def _ended(self, steps: int) -> None:
        self.chains, self.steps = self.chains + 1, self.steps + steps
        if steps < _SHORT:
            self._short += 1
        else:
            self._short = self._short_batches = 0
        if self._short >= _PATIENCE:
            self._short, self._short_batches = 0, self._short_batches + 1
            self.active = False  # until the next batch
        if self._short_batches >= _BATCHES:
            self.remove(
                f"its loop uses every step's result before the next step: {self.chains} chains of {self.steps} steps"
            )
        elif steps >= _SHORT and self.choice.choices and set(self.choice.choices.values()) == {"loop"}:
            self.remove(
                f"no schedule was faster than the loop (measured {max(self.choice.speed.values(), default=1.0):.2f})"
            )


def result_shapes(results: Any) -> list[tuple[int, ...]] | None:
    """Return the shapes of a call's distinct results without the batch; ``None`` if they have no common one."""
    leaves: list[Any] = []
    flatten(results, leaves)
    distinct: list[Tensor] = []
    for leaf in leaves:
        if not any(leaf is d for d in distinct):
            distinct.append(leaf)
    first = distinct[0]
    if any(d.dim() < 2 or d.shape[0] != first.shape[0] or d.dtype != first.dtype for d in distinct):
        return None
    return [tuple(d.shape[1:]) for d in distinct]
