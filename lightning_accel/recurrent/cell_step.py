"""What a recurrent cell is to the schedules: a step on flat lists of tensors, with states it passes to itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_accel.recurrent.instance_forward import InstanceForward, plain_forward

Step = Callable[[nn.Module, Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]

TORCH_CELLS: dict[type[nn.Module], str] = {nn.LSTMCell: "lstm", nn.GRUCell: "gru", nn.RNNCell: "rnn"}
_KERNELS: dict[str, Callable[..., Any]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "tanh": torch.rnn_tanh,
    "relu": torch.rnn_relu,
}


def is_torch_cell(module: nn.Module) -> bool:
    """Tell ``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell`` themselves; a subclass may compute anything."""
    return type(module) in TORCH_CELLS


def is_native(module: nn.Module) -> bool:
    """Tell whether a kernel of torch's layers computes what calls of this cell compute: nobody replaced its forward."""
    own = module.__dict__.get("forward")
    while isinstance(own, InstanceForward):
        own = own.own
    if isinstance(own, MethodType) and own.__self__ is module and own.__func__ is type(module).forward:
        own = None  # what `InstanceForward` leaves in a copy
    return is_torch_cell(module) and own is None


def torch_cell_step(
    cell: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Make one step of a torch cell; its output is its hidden state."""
    # A deferred cell stands behind its own recording, which must not record what computes it.
    call = plain_forward(cell) if isinstance(cell.__dict__.get("forward"), InstanceForward) else cell
    if isinstance(cell, nn.LSTMCell):
        h, c = call(xs[0], (states[0], states[1]))
        return [h], [h, c]
    h = call(xs[0], states[0])
    return [h], [h]


@dataclass
class Nesting:
    """How what a step returned last nests; a schedule returns the same, since its trace ran the step."""

    ys: pytree.TreeSpec | None = None
    states: pytree.TreeSpec | None = None


def nesting_of(step: Step) -> Nesting | None:
    """Return how the results of a step nest, to be read and assigned; ``None`` for steps whose results are flat."""
    inner = step.step if isinstance(step, HeldStep) else step
    return inner.returned if isinstance(inner, CellStep) else None


@dataclass(frozen=True)
class CellStep:
    """A user's step ``cell(x, state) -> (y, state)`` on flat lists.

    Attributes:
        x_tree, state_tree: How the flat lists nest.
        returned: How the results nest, filled in by the first call.
    """

    x_tree: pytree.TreeSpec
    state_tree: pytree.TreeSpec
    returned: Nesting = field(default_factory=Nesting, compare=False)

    def __call__(
        self, cell: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Make one step."""
        result = cell(
            pytree.tree_unflatten(list(xs), self.x_tree), pytree.tree_unflatten(list(states), self.state_tree)
        )
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"a cell must return `(y_t, state)`, {type(cell).__name__} returned {type(result).__name__}."
            )
        ys, self.returned.ys = pytree.tree_flatten(result[0])
        following, self.returned.states = pytree.tree_flatten(result[1])
        return ys, following

    def after_one(self) -> "CellStep":
        """Return the step that takes its state in the form in which this one returned it."""
        following = self.returned.states
        if following is None or following == self.state_tree:
            return self
        return CellStep(self.x_tree, following, self.returned)


@dataclass(frozen=True)
class HeldStep:
    """A step whose states stay as they are where the last input, a mask of shape (B,), is false.

    Attributes:
        step: The step that is held.
    """

    step: Step

    def __call__(
        self, cell: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Make one step."""
        *inner, running = xs
        ys, following = self.step(cell, inner, states)
        if len(following) != len(states):
            raise ValueError(
                f"with `lengths` a state must keep its form: {len(states)} tensors went in, {len(following)} came out."
            )
        held = [
            torch.where(running.view(-1, *[1] * (new.dim() - 1)), new, old)
            for new, old in zip(following, states, strict=True)
        ]
        return ys, held

    def after_one(self) -> "HeldStep":
        """Return the step that takes its state in the form in which this one returned it."""
        if not isinstance(self.step, CellStep):
            return self
        following = self.step.after_one()
        return self if following is self.step else HeldStep(following)


def run_loop(
    step: Step, module: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the plain loop: every schedule has to compute what this does.

    Args:
        step: One step.
        module: The cell.
        xs: Each of shape (T, B, ...).
        states: Each of shape (B, ...).

    Returns:
        Outputs, each of shape (T, B, ...), and final states.
    """
    columns: list[list[Tensor]] = []
    states = list(states)
    for x in zip(*(x.unbind(0) for x in xs), strict=True):
        ys, states = step(module, x, states)
        if not columns and isinstance(step, (CellStep, HeldStep)):
            step = step.after_one()
        columns = columns or [[] for _ in ys]
        for column, y in zip(columns, ys, strict=True):
            column.append(y)
    return [torch.stack(column) for column in columns], list(states)


def run_native(cell: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Run one of torch's cells over a sequence with the kernel of ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``."""
    assert isinstance(cell, (nn.LSTMCell, nn.GRUCell, nn.RNNCell))
    weights = [cell.weight_ih, cell.weight_hh]
    if cell.bias:
        weights += [cell.bias_ih, cell.bias_hh]
    kind = cell.nonlinearity if isinstance(cell, nn.RNNCell) else TORCH_CELLS[type(cell)]
    hx = [s[None] for s in states]
    y, *last = _KERNELS[kind](
        xs[0], hx if kind == "lstm" else hx[0], weights, cell.bias, 1, 0.0, cell.training, False, False
    )
    return [y], [s[0] for s in last]
