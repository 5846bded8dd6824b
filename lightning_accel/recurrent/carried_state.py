"""Carry the state of a recurrent layer from batch to batch of a long stream: truncated backpropagation."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_accel import torch_private
from lightning_accel.recurrent.deferred.call_layout import as_plain, as_tuples, flatten, unflatten
from lightning_accel.recurrent.graph_rnn import GraphRNN
from lightning_accel.recurrent.instance_forward import InstanceForward, plain_forward
from lightning_accel.recurrent.module import Recurrent

_NESTING = "nesting of a state"  # what is taken apart has this key in a checkpoint
_STATE_NAMES = ("hx", "state")  # torch's name of a layer's state, and ours


@dataclass
class Stream:
    """What is carried of one of the calls that a layer gets in a batch.

    Attributes:
        start: State at the begin of the history.
        history: Earlier batches that are run again: arguments of the call but for the state, and its resets.
        last: State at the end of this batch, not yet detached.
    """

    start: Any = None
    history: list[tuple[dict[str, Any], Tensor | None]] = field(default_factory=list)
    last: Any = None


class CarriedState:
    """Stand before one layer's ``forward``; calls without a state go on where the batch before ended.

    The k-th such call of a batch goes on where the k-th call of the batch before ended. A call that is given what an
    earlier call of this batch returned belongs to the same stream.

    Args:
        layer: `Recurrent`, ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, or a subclass; its forward takes ``hx`` or ``state``.
        prefix_batches: Earlier batches that are run again before each one, so that gradients reach back into them.
        name: Of the layer, for messages.

    Attributes:
        active: Whether states are carried now.
        resets: Streams that begin anew with this batch, shape (B,); ``None`` for none.
    """

    def __init__(self, layer: nn.Module, prefix_batches: int = 0, *, name: str = "the layer") -> None:
        self.layer, self.prefix_batches, self.name = layer, prefix_batches, name
        self.active = False
        self.resets: Tensor | None = None
        self._streams: list[Stream] = []
        self._calls = self._calls_before = 0
        self._signature = inspect.signature(plain_forward(layer))
        self._batch_dim = 0 if isinstance(layer, Recurrent) else 1
        self._forward = InstanceForward(layer, self._call)

    def begin(self) -> None:
        """Forget everything: every stream begins anew."""
        self._streams, self._calls, self._calls_before = [], 0, 0

    def remove(self) -> None:
        """Give the layer its own forward back."""
        self._forward.remove()

    def finish(self) -> None:
        """End a batch: what its calls ended with is where the next ones begin.

        Raises:
            ValueError: If the layer was called another number of times than in the batch before.
        """
        self.active = False
        if self._calls and self._calls_before and self._calls != self._calls_before:
            raise ValueError(
                f"StatefulStreams can not tell the streams of `{self.name}` apart: it was called {self._calls} times "
                f"in this batch and {self._calls_before} times in the one before; call it equally often in every batch."
            )
        self._calls_before, self._calls = self._calls or self._calls_before, 0
        for stream in self._streams:
            if stream.last is not None and not self.prefix_batches:
                stream.start = _detached(stream.last)
            stream.last = None

    def state(self) -> dict[str, Any]:
        """Return what is carried."""
        streams = [{"start": _written(s.start), "history": [_written(h) for h in s.history]} for s in self._streams]
        return {"streams": streams, "calls": self._calls_before}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with what was carried."""
        self._streams = [Stream(_read(s["start"]), [_read(h) for h in s["history"]]) for s in state["streams"]]
        self._calls, self._calls_before = 0, state["calls"]

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self._forward.original(*args, **kwargs)
        if torch_private.running_backward() >= 0:
            raise ValueError(
                f"StatefulStreams can not carry the state of `{self.name}`, which checkpointing runs again in the "
                "backward; take it out of `torch.utils.checkpoint`."
            )
        bound = self._signature.bind(*args, **kwargs).arguments
        given = self._spread(bound)
        state_name = next(n for n in _STATE_NAMES if n in self._signature.parameters)
        state = given.pop(state_name, None)
        if state is not None:
            return self._go_on(state, args, kwargs)
        streams, batched = self._count(given)
        if self._calls == len(self._streams):
            self._streams.append(Stream())
        stream = self._streams[self._calls]
        self._calls += 1
        self._check(stream, streams, batched=batched)
        state, following = self._to(stream.start, given), []
        for old, resets in stream.history:
            _, state = self._run(old, state_name, self._reset(state, resets, batched=batched))
            following.append(state)
        result = self._run(given, state_name, self._reset(state, self.resets, batched=batched))
        stream.last = result[1]
        if self.prefix_batches:
            following.append(stream.last)
            stream.history.append(({n: _detached(v) for n, v in given.items()}, self.resets))
            while len(stream.history) > self.prefix_batches:
                stream.history.pop(0)
                stream.start = _detached(following.pop(0))
        return result

    def _go_on(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that is given a state; where a call of this batch returned it, the stream goes on here."""
        result = self._forward.original(*args, **kwargs)
        leaves = {id(s) for s in pytree.tree_leaves(state)}
        for stream in self._streams:
            if stream.last is not None and leaves & {id(s) for s in pytree.tree_leaves(stream.last)}:
                if self.prefix_batches:
                    raise ValueError(
                        f"`prefix_batches` needs one call of `{self.name}` a stream and batch, but a call went on with "
                        "the state that another one returned; set `prefix_batches=0`."
                    )
                stream.last = self._checked(result)[1]
        return result

    def _run(self, given: dict[str, Any], state_name: str, state: Any) -> tuple[Any, Any]:
        return self._checked(self._forward.original(**given, **{state_name: state}))

    def _checked(self, result: Any) -> tuple[Any, Any]:
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(
                f"StatefulStreams needs `output, state` from `{self.name}`, {type(self.layer).__name__} returned "
                f"{type(result).__name__}."
            )
        return result

    def _spread(self, bound: dict[str, Any]) -> dict[str, Any]:
        """Turn ``**kwargs`` of the signature into single arguments."""
        given: dict[str, Any] = {}
        for name, value in bound.items():
            kind = self._signature.parameters[name].kind
            given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        return given

    def _count(self, given: dict[str, Any]) -> tuple[int, bool]:
        """Return the number of streams of a call, and whether its states have a dimension of them."""
        x = next(iter(given.values()))
        if isinstance(x, PackedSequence):
            return int(x.batch_sizes[0]), True
        first = next(leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor))
        if not isinstance(self.layer, Recurrent) and first.dim() == 2:
            return 1, False
        return int(first.shape[0 if getattr(self.layer, "batch_first", False) else 1]), True

    def _to(self, state: Any, given: dict[str, Any]) -> Any:
        """Bring a state to the call's device; after a resume it may be on another."""
        x = next(iter(given.values()))
        data = x.data if isinstance(x, PackedSequence) else pytree.tree_leaves(x)[0]
        return pytree.tree_map(lambda s: s.to(data.device) if isinstance(s, Tensor) else s, state)

    def _reset(self, state: Any, resets: Tensor | None, *, batched: bool) -> Any:
        if state is None or resets is None:
            return state

        def zeroed(s: Any) -> Any:
            if not isinstance(s, Tensor):
                return s
            shape = [1] * s.dim()
            if batched:
                shape[self._batch_dim] = len(resets)
            return torch.where(resets.to(s.device).view(shape), torch.zeros_like(s), s)

        return pytree.tree_map(zeroed, state)

    def _check(self, stream: Stream, streams: int, *, batched: bool) -> None:
        carried = [] if stream.start is None else [s for s in pytree.tree_leaves(stream.start) if isinstance(s, Tensor)]
        known = carried[0].shape[self._batch_dim] if carried and batched else streams
        if known != streams or (self.resets is not None and self.resets.shape != (streams,)):
            raise ValueError(
                f"streams can not change their number within an epoch: {known} are carried and a batch has {streams}; "
                "use `drop_last=True`, and one reset a stream."
            )


def _written(value: Any) -> Any:
    """Take named tuples, packed sequences and dataclasses apart, which not every way of loading takes."""
    leaves: list[Any] = []
    nesting = flatten(value, leaves)
    return {_NESTING: as_plain(nesting), "leaves": leaves} if _has_class(nesting) else value


def _has_class(nesting: Any) -> bool:
    return isinstance(nesting, type) or (isinstance(nesting, tuple) and any(map(_has_class, nesting)))


def _read(written: Any) -> Any:
    if not isinstance(written, dict) or _NESTING not in written:
        return written
    return unflatten(as_tuples(written[_NESTING]), iter(written["leaves"]))


def _detached(value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return PackedSequence(value.data.detach(), value.batch_sizes, value.sorted_indices, value.unsorted_indices)
    return pytree.tree_map(lambda s: s.detach().clone() if isinstance(s, Tensor) else s, value)


def recurrent_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose state can be carried, by name; what a cell of a `Recurrent` holds is part of its step."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, (Recurrent, nn.RNNBase))}
    outer = [f"{n}." for n, m in found.items() if isinstance(m, Recurrent)]
    return {n: m for n, m in found.items() if not n.startswith(tuple(outer))}


def why_not_carried(model: nn.Module) -> str | None:
    """Name a layer whose state can not be carried, and say why; ``None`` if all can."""
    for name, module in model.named_modules():
        if isinstance(module, GraphRNN) and any(node.period for node in module.graph.nodes.values()):
            return f"`{name}` has clocks, which count from the start of every batch"
    for name, layer in recurrent_layers(model).items():
        if layer.bidirectional:
            return f"`{name}` is bidirectional: its reverse direction comes from the future, not from the batch before"
        try:
            parameters = inspect.signature(plain_forward(layer)).parameters
        except (TypeError, ValueError):
            parameters = {}  # type: ignore[assignment]
        if not any(n in parameters for n in _STATE_NAMES):
            return f"`{name}`: {type(layer).__name__}.forward takes no argument `hx` or `state`"
    return None
