"""`Recurrent`: run any cell over a sequence with the best schedule."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from lightning_accel.machine.transfers import send_to_device
from lightning_accel.recurrent.cell_step import CellStep, HeldStep, Step, is_torch_cell, run_loop, torch_cell_step
from lightning_accel.recurrent.schedule_choice import Schedule, ScheduleChoice


class Recurrent(nn.Module):
    """Run a cell, which describes one time step, over whole sequences: ``y, state = rnn(x, state)``.

    One step and its derivative are traced; Tarjan's components of the graph with its delay edges are the loops, and
    only they run step by step. The parameters stay the cell's own, under ``cell.`` in the state dict.

    Args:
        cell: ``cell(x_t, state) -> (y_t, state)`` with tensors of shape (B, ...), or ``nn.LSTMCell``, ``nn.GRUCell``,
            ``nn.RNNCell``. A method ``initial_state(x_t)`` gives the state where the caller gives none. Random numbers
            (dropout masks) belong into the input: ``x`` may be a tuple of tensors.
        batch_first: Whether inputs and outputs are of shape (B, T, ...) instead of (T, B, ...).
        bidirectional: Whether a copy of the cell with parameters of its own, ``cell_reverse``, runs backwards; the two
            outputs are concatenated and the state is the pair of both states.
        schedule: ``"auto"`` chooses by measurement, once for each kind of call; ``"loop"``, ``"intra_stream"``,
            ``"compiled"`` (its loops as machine code), ``"scan"`` and ``"native"`` (the kernels of ``nn.LSTM``,
            ``nn.GRU`` and ``nn.RNN``) force one.

    Raises:
        ValueError: If ``schedule`` is unknown.

    References:
        Hwang, Sung, "Single Stream Parallelization of Generalized LSTM-like RNNs", arXiv:1503.02852. *Deviations*: see
        `lightning_accel.recurrent.compiler.executor.StepSchedule`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_accel.recurrent import Recurrent
        >>> rnn = Recurrent(nn.LSTMCell(4, 8))
        >>> y, (h, c) = rnn(torch.randn(10, 2, 4))  # steps, streams, features
        >>> y.shape
        torch.Size([10, 2, 8])
    """

    def __init__(
        self, cell: nn.Module, batch_first: bool = False, bidirectional: bool = False, schedule: Schedule = "auto"
    ) -> None:
        super().__init__()
        self.cell = cell
        self.batch_first, self.bidirectional = batch_first, bidirectional
        self.cell_reverse = _reset(copy.deepcopy(cell)) if bidirectional else None
        self._choices = [ScheduleChoice(c, schedule, name=type(cell).__name__) for c in self._cells()]

    @property
    def schedules(self) -> list[ScheduleChoice]:
        """Return what chooses and runs the schedule, one a direction."""
        return self._choices

    def ask(self, original: "Recurrent") -> None:
        """Run as ``original`` does, of which this is a copy, without tracing and measuring again."""
        pairs = zip(original.schedules, self._cells(), strict=True)
        self._choices = [choice.for_copy(cell) for choice, cell in pairs]

    def forward(self, x: Any, state: Any = None, lengths: Tensor | None = None) -> tuple[Any, Any]:
        """Run the sequence.

        Args:
            x: A tensor (T, B, ...), a tuple of such, or a `PackedSequence`.
            state: As the cell takes it; with ``bidirectional`` a pair. By default the cell's ``initial_state``.
            lengths: Steps of each stream, shape (B,), 0 to T. Past its end a stream's state stays as it is, its outputs
                are zero, and its inputs are not looked at. On a device they are not checked, which would wait for it:
                there a number that is out of range counts as the next one that is not.

        Returns:
            Outputs and the final state, nested as the cell nests them. Each output is of shape (T, B, ...), or packed
            as ``x`` is; both directions are concatenated along the last dimension.

        Raises:
            ValueError: If there is no time step, if no state is given and the cell makes none, or if ``lengths`` is
                given for a packed sequence or does not fit.
        """
        if isinstance(x, PackedSequence):
            if lengths is not None:
                raise ValueError("`lengths` must not be given with a PackedSequence, which has its own.")
            return self._run_packed(x, state)
        leaves, tree = pytree.tree_flatten(x)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            kinds = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)})
            raise TypeError(f"`x` must be a tensor or hold nothing but tensors, got {', '.join(kinds)} in it.")
        if self.batch_first:
            leaves = [leaf.transpose(0, 1) for leaf in leaves]
        if not leaves or leaves[0].shape[0] == 0:
            raise ValueError("`x` must have at least one time step; drop empty sequences from the batch.")
        y, last = self._run(leaves, tree, state, lengths)
        return (pytree.tree_map(lambda t: t.transpose(0, 1), y) if self.batch_first else y), last

    def _run(self, leaves: list[Tensor], tree: Any, state: Any, lengths: Tensor | None) -> tuple[Any, Any]:
        if lengths is not None:
            lengths = _checked(lengths, leaves[0])
        if self.cell_reverse is None:
            return self._run_direction(0, leaves, tree, state, lengths)
        steps, streams = leaves[0].shape[:2]
        ends = torch.full((streams,), steps, device=leaves[0].device) if lengths is None else lengths
        flipped = [_flip(leaf, ends) for leaf in leaves]
        states = (None, None) if state is None else state
        forward, last = self._run_direction(0, leaves, tree, states[0], lengths)
        backward, last_reverse = self._run_direction(1, flipped, tree, states[1], lengths)
        y = pytree.tree_map(lambda f, b: torch.cat([f, _flip(b, ends)], -1), forward, backward)
        return y, (last, last_reverse)

    def _run_direction(
        self, direction: int, leaves: list[Tensor], tree: Any, state: Any, lengths: Tensor | None
    ) -> tuple[Any, Any]:
        cell = self._cells()[direction]
        if state is None:
            state = _initial_state(cell, pytree.tree_unflatten([leaf[0] for leaf in leaves], tree))
        states, state_tree = pytree.tree_flatten(state)
        choice = self._choice(direction, cell)
        step: Step = torch_cell_step
        if not is_torch_cell(cell):
            step = CellStep(tree, state_tree) if choice is None else choice.known_step(CellStep(tree, state_tree))
        running = None if lengths is None else _running(lengths, leaves[0].shape[0])
        used = step if running is None else HeldStep(step)
        if running is not None:
            leaves = [*(leaf.masked_fill(~_wide(running, leaf), 0) for leaf in leaves), running]
        ys, last = run_loop(used, cell, leaves, states) if choice is None else choice.run(used, leaves, states)
        if running is not None:
            ys = [y.masked_fill(~_wide(running, y), 0) for y in ys]
        if not isinstance(step, CellStep):
            return ys[0], pytree.tree_unflatten(last, state_tree)
        assert step.returned.ys is not None
        assert step.returned.states is not None
        return pytree.tree_unflatten(ys, step.returned.ys), pytree.tree_unflatten(last, step.returned.states)

    def _choice(self, direction: int, cell: nn.Module) -> ScheduleChoice | None:
        """Return what chooses the cell's schedule; ``None`` for a replica, whose weights are nobody's parameters."""
        if torch.compiler.is_compiling() or getattr(self, "_is_replica", False):
            return None
        choice = self._choices[direction]
        if choice.module is not cell:  # another cell was put in its place
            choice = ScheduleChoice(cell, choice.schedule, name=type(cell).__name__)
            self._choices[direction] = choice
        return choice

    def _run_packed(self, x: PackedSequence, state: Any) -> tuple[Any, Any]:
        padded, lengths = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes))
        if x.sorted_indices is not None and state is not None:
            state = pytree.tree_map(lambda s: s.index_select(0, x.sorted_indices), state)
        y, last = self._run(*pytree.tree_flatten(padded), state, lengths)
        if x.unsorted_indices is not None:
            last = pytree.tree_map(lambda s: s.index_select(0, x.unsorted_indices), last)
        # which rows there are is known on the host
        rows = send_to_device(_running(lengths, padded.shape[0]).flatten().nonzero()[:, 0], padded.device)
        return pytree.tree_map(
            lambda t: PackedSequence(
                t.flatten(0, 1).index_select(0, rows), x.batch_sizes, x.sorted_indices, x.unsorted_indices
            ),
            y,
        ), last

    def _cells(self) -> list[nn.Module]:
        return [self.cell] if self.cell_reverse is None else [self.cell, self.cell_reverse]

    def extra_repr(self) -> str:
        """Say what differs from the default."""
        schedule = self._choices[0].schedule
        return f"batch_first={self.batch_first}, bidirectional={self.bidirectional}, schedule={schedule!r}"


def _reset(cell: nn.Module) -> nn.Module:
    for module in cell.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return cell


def _initial_state(cell: nn.Module, x: Any) -> Any:
    make = getattr(cell, "initial_state", None)
    if callable(make):
        return make(x)
    if isinstance(cell, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)):
        zeros = x.new_zeros(x.shape[0], cell.hidden_size)
        return (zeros, zeros) if isinstance(cell, nn.LSTMCell) else zeros
    raise ValueError(f"`state` must be given: {type(cell).__name__} has no method `initial_state(x_t)`.")


def _checked(lengths: Tensor, like: Tensor) -> Tensor:
    """Return lengths on the device of an input; those of the host have to fit it."""
    steps, streams = like.shape[:2]
    here = lengths.device.type == "cpu"
    if lengths.shape != (streams,) or (here and (int(lengths.min()) < 0 or int(lengths.max()) > steps)):
        found = lengths.tolist() if here else f"a tensor of shape {tuple(lengths.shape)}"
        raise ValueError(f"`lengths` must be {streams} numbers from 0 to {steps}, got {found}; make them fit `x`.")
    return send_to_device(lengths if here else lengths.clamp(0, steps), like.device)


def _running(lengths: Tensor, steps: int) -> Tensor:
    return torch.arange(steps, device=lengths.device)[:, None] < lengths[None, :]


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (like.dim() - 2))


def _flip(x: Tensor, lengths: Tensor) -> Tensor:
    """Turn every stream around in itself; what lies past its end stays there."""
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    ends = lengths[None, :]
    source = torch.where(steps < ends, ends - 1 - steps, steps)
    return x[source, torch.arange(x.shape[1], device=x.device)[None, :]]
