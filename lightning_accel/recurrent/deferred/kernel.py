"""What computes the steps of a loop over one cell: all at once by a schedule, or one by one as the loop does."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from lightning_accel.recurrent.cell_step import is_torch_cell, run_loop, torch_cell_step
from lightning_accel.recurrent.compiler.trace import as_function
from lightning_accel.recurrent.deferred.call_layout import CallLayout
from lightning_accel.recurrent.schedule_choice import ScheduleChoice

SHORTEST = 4  # steps; a loop of fewer is not worth a schedule


class Kernel:
    """Compute steps of a cell.

    Args:
        layout: Form of its calls.
        choice: Of the schedule; holds the cell.
    """

    def __init__(self, layout: CallLayout, choice: ScheduleChoice) -> None:
        self.layout, self.choice = layout, choice
        self.cell = choice.module
        self.native = is_torch_cell(self.cell)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the cell's parameters."""
        return list(self.cell.parameters())

    @property
    def is_loop(self) -> bool:
        """Whether no kind of call seen so far has a schedule that is faster than the loop."""
        return bool(self.choice.choices) and set(self.choice.choices.values()) == {"loop"}

    def run(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Run all steps by the chosen schedule.

        Args:
            xs: Each of shape (T, B, ...).
            states: Each of shape (B, ...).

        Returns:
            The distinct results of all calls, each of shape (T, B, ...), and by their indices those results of the last
            call that have a gradient where the result of all calls has none.
        """
        if not self.native:
            return self.choice.run(self.layout, xs, states)[0], {}
        if not isinstance(self.cell, nn.LSTMCell):
            return self.choice.run(torch_cell_step, xs, states)[0], {}
        if self.choice.schedule in ("auto", "native"):  # torch's kernel is the best, but keeps c_t to itself
            (hidden,), (_, memory) = self.choice.run(torch_cell_step, xs, states)
            if "native" in self.choice.choices.values():
                return [hidden, _memories(self.cell, xs[0], hidden, states)], {1: memory}
        return self.choice.run(self.layout, xs, states)[0], {}

    def run_one_by_one(self, xs: Sequence[Tensor], states: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Compute what `run` does as the loop does, with other tensors in the parameters' places."""
        stepper, named = as_function(self.cell, self._loop, [*weights, *self.cell.buffers()])
        outputs: list[Tensor] = functional_call(stepper, named, (xs, states))
        return outputs

    def _loop(self, cell: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor]:
        return run_loop(self.layout, cell, xs, states)[0]


@torch.no_grad()
def _memories(cell: nn.LSTMCell, x: Tensor, hidden: Tensor, states: Sequence[Tensor]) -> Tensor:
    """Return the c_t of all steps, which ``nn.LSTM`` keeps to itself, from its h_t: all gates are one product then."""
    size = cell.hidden_size
    before = torch.cat([states[0][None], hidden[:-1]])
    weights = torch.cat([cell.weight_ih[: 3 * size], cell.weight_hh[: 3 * size]], 1)  # all gates but that of the output
    bias = cell.bias_ih[: 3 * size] + cell.bias_hh[: 3 * size] if cell.bias else None
    gates = linear(torch.cat([x, before], -1), weights, bias)
    keep_and_write = gates[..., : 2 * size].sigmoid_()
    added = gates[..., 2 * size :].tanh_().mul_(keep_and_write[..., :size])
    memories, memory = torch.empty_like(hidden), states[1]
    for out, keep, new in zip(memories, keep_and_write[..., size:], added, strict=True):
        memory = torch.addcmul(new, keep, memory, out=out)
    return memories
