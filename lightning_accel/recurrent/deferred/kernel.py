"""What computes the steps of a loop over one cell: all at once by a schedule, or one by one as the loop does."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from lightning_accel.recurrent.cell_step import is_native, is_torch_cell, run_loop, run_native, torch_cell_step
from lightning_accel.recurrent.compiler.trace import as_function
from lightning_accel.recurrent.deferred.call_layout import CallLayout
from lightning_accel.recurrent.exactness.plain_modes import plain_reason
from lightning_accel.recurrent.exactness.private_copy import private_copy
from lightning_accel.recurrent.exactness.verification import Run, verify_call
from lightning_accel.recurrent.schedule_choice import TRIAL_STEPS, ScheduleChoice, kind_of_call, measured_seconds

_LOOKED_AT = 5  # steps
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
        self._agrees: dict[str, bool] = {}

    def for_copy(self, cell: nn.Module) -> "Kernel":
        """Return the same for a copy of the cell, with that one's weights."""
        twin = Kernel(self.layout, self.choice.for_copy(cell))
        twin._agrees = self._agrees
        return twin

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
        if self._takes_torchs_kernel(xs, states):
            return self._run_torchs_kernel(self.cell, xs, states)
        return self.choice.run(self.layout, xs, states)[0], {}

    def _takes_torchs_kernel(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> bool:
        """See whether torch's kernel is the best for an LSTM although it keeps c_t to itself; measured once a kind."""
        if self.choice.schedule not in ("auto", "native") or not is_native(self.cell):
            return False
        if plain_reason(xs, states) is not None:
            return False
        kind, choices = kind_of_call(self.layout, xs, states), self.choice.choices
        if kind not in self._agrees:
            self._agrees[kind] = self._agrees_with_the_loop(xs, states)
        if not self._agrees[kind]:
            if choices.get(kind) == "native":
                del choices[kind]
        elif self.choice.schedule == "native":
            choices[kind] = "native"
        elif kind not in choices:
            self._choose(kind, xs, states)
        return choices.get(kind) == "native"

    def _choose(self, kind: str, xs: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        """Measure torch's kernel beside the best of all others."""
        steps = min(len(xs[0]), TRIAL_STEPS)
        short, start = [x[:steps].detach() for x in xs], [s.detach() for s in states]
        candidates: dict[str, Run] = {
            "native": lambda cell, xs, states: (self._run_torchs_kernel(cell, xs, states)[0], []),
            "another": self.choice.runner(self.layout, xs, states),
        }
        seconds = measured_seconds(candidates, self.cell, short, start)
        faster = seconds["another"] / max(seconds["native"], 1e-9)
        if faster > 1:
            self.choice.choices[kind] = "native"
            self.choice.speed[kind] = faster * self.choice.speed.get(kind, 1.0)

    def _agrees_with_the_loop(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> bool:
        try:
            verify_call(run_native, self.cell, torch_cell_step, xs, states)
            with torch.no_grad():
                few = [x[:_LOOKED_AT] for x in xs]
                hidden, memories = self._run_torchs_kernel(self.cell, few, states)[0]
                expected = run_loop(self.layout, private_copy(self.cell), few, states)[0]
            for found, plain in zip((hidden, memories), expected, strict=True):
                torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5, equal_nan=True)
        except Exception as error:
            self.choice.refusals["native"] = f"{type(error).__name__}: {error}"
            return False
        return True

    def _run_torchs_kernel(
        self, cell: nn.Module, xs: Sequence[Tensor], states: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        (hidden,), (_, memory) = run_native(cell, xs, states)
        assert isinstance(cell, nn.LSTMCell)
        return [hidden, _memories(cell, xs[0], hidden, states)], {1: memory}

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
