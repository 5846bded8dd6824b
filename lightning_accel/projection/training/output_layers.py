"""Which layers write what a model puts out, read off the autograd graph of a real training step.

Rows of such a layer are classes, pixels, targets of a regression: clearing one is not making the model smaller, but
making it unable to say something. No name tells (``head``, ``fc``, ``decoder.2``), the graph does.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parameter import UninitializedParameter

from lightning_accel.projection.training.targets import Target

_LEFT_ALONE = (torch.jit.ScriptModule, nn.RNNBase, nn.RNNCellBase)


class OutputLayers:
    """Watches the calls of a model's layers until it is known which of them write its output.

    A layer writes the output if a path leads from the loss (or from what the model's own ``forward`` returned) back to
    a result of the layer, with no other layer of weight matrices on it that the same optimizer trains. Norms, scales
    and activations do not count as layers: what comes after them is as wide as before. Layers of other optimizers and
    frozen ones do not either: behind a discriminator or a frozen critic, the generator's last layer writes images.

    Hooks see the calls of one training step; recurrent layers get none, for they are no stops but look at their hooks.

    Losses of derivatives (equations of physics, forces, gradient penalties) reach every activation past the layers
    behind it. Where a step has differentiated through a layer to go on with the result, what no other layer has used
    counts as where a loss begins.

    Args:
        model: To watch, from here until `stop`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._calls: dict[nn.Module, list[Node]] = {}
        self._losses: list[Node] = []
        self._results: list[Node] = []
        self._is_differentiated = False  # by a backward pass that is part of the graph itself
        self._modules = dict(model.named_modules(remove_duplicate=False))
        # also what has its weights in parts: these are not called where it reads them (a decoder with a filter bank)
        parts = (m for m in model.modules() if m is not model and not isinstance(m, _LEFT_ALONE))
        watched = [m for m in parts if any(map(_is_watched, m.modules()))]
        self._handles: list[Any] = [module.register_forward_hook(self._note_call) for module in watched]
        if not isinstance(model, _LEFT_ALONE):
            self._handles.append(model.register_forward_hook(self._note_result))

    def __deepcopy__(self, _: object) -> "OutputLayers":
        """Copies of a watched model are not watched."""
        return _blind()

    def __reduce__(self) -> Any:
        """As `__deepcopy__`."""
        return _blind, ()

    def close(self) -> None:
        """Watch no more; what was seen is kept."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def stop(self) -> None:
        """Watch no more, and let the graph go."""
        self.close()
        self._calls, self._losses, self._results = {}, [], []
        self._is_differentiated = False

    def note_loss(self, loss: object) -> None:
        """Take a loss that a backward pass is about to begin from."""
        self._losses += _nodes(loss)

    def sort_out(self, trained: Iterable[tuple[AbstractSet[nn.Module], Sequence[Target]]]) -> dict[str, bool]:
        """Say of each target whether its layer writes the output; those that took no part in the step are left out.

        Without a loss, results that no other watched layer has used count as where a loss begins.

        Args:
            trained: For each optimizer the modules whose own weight matrices it trains, and its targets.
        """
        found: dict[str, bool] = {}
        losses = [] if self._is_differentiated else self._losses
        roots = [*(losses or self._loose_ends()), *self._results]
        everything = _reach(roots, set())
        leaves = {id(leaf): node for node in everything if (leaf := getattr(node, "variable", None)) is not None}
        for modules, targets in trained:
            open_to_roots = _reach(roots, self._stops(modules))
            for target in targets:
                nodes = self._nodes_of(target, leaves) & everything
                if nodes:
                    found[target.name] = bool(nodes & open_to_roots) or found.get(target.name, False)
        return found

    def _note_call(self, module: nn.Module, _: Any, output: object) -> None:
        nodes = list(_nodes(output))
        if nodes and self._handles:
            self._calls.setdefault(module, []).extend(nodes)
            for node in nodes:
                node.register_prehook(self._note_backward)

    def _note_backward(self, *_: object) -> None:
        self._is_differentiated |= torch.is_grad_enabled()  # within a backward pass only by ``create_graph=True``

    def _note_result(self, *call: object) -> None:
        if self._handles:
            self._results += _nodes(call[-1])

    def _stops(self, modules: AbstractSet[nn.Module]) -> set[Node]:
        """Return the results of layers that have a part among ``modules``, and call no other that was seen."""
        layers = [m for m in self._calls if self._is_inmost(m) and any(part in modules for part in m.modules())]
        return {node for layer in layers for node in self._calls[layer]}

    def _is_inmost(self, module: nn.Module) -> bool:
        """Say whether no part of a module was called: one with parts (a table of positions beside them) is no layer."""
        return not any(part in self._calls for part in module.modules() if part is not module)

    def _nodes_of(self, target: Target, leaves: Mapping[int, Node]) -> set[Node]:
        """Return where a target entered the graph: results of its layers, else of what they are in, else itself."""
        nodes = {n for m in self._calls if target.parameter in _own(m) for n in self._calls[m]}
        path = target.name
        while not nodes and path:  # its module was not called: what it is a part of has used the weight itself
            path = path.rpartition(".")[0]
            around = self._modules.get(path)
            if path and around in self._calls and self._is_inmost(around):
                nodes = set(self._calls[around])
        leaf = leaves.get(id(target.parameter))
        return nodes or ({leaf} if leaf is not None else set())

    def _loose_ends(self) -> list[Node]:
        calls = [node for nodes in self._calls.values() for node in nodes]
        used = _reach([after for node in calls for after, _ in node.next_functions if after is not None], set())
        return [node for node in calls if node not in used]


def has_matrices(module: nn.Module) -> bool:
    """Say whether a module itself owns a weight with at least two dimensions, or one that is still to get a shape."""
    return any(isinstance(p, UninitializedParameter) or p.ndim > 1 for p in _own(module))


def _is_watched(module: nn.Module) -> bool:
    return has_matrices(module) and not isinstance(module, _LEFT_ALONE)


def _own(module: nn.Module) -> "_Identities":
    return _Identities(p for p in module._parameters.values() if p is not None)


class _Identities(list[nn.Parameter]):
    """Parameters, told apart by what they are and not by their values."""

    def __contains__(self, parameter: object) -> bool:
        return any(own is parameter for own in self)


def _blind() -> OutputLayers:
    watch = object.__new__(OutputLayers)
    watch._handles = []
    return watch


def _nodes(value: object) -> Iterator[Node]:
    """Yield what made the tensors in a value, a container of values or an object of some library's own."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value.grad_fn
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _nodes(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _nodes(part)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _nodes(getattr(value, name, None))


def _reach(roots: Iterable[Node], stops: set[Node]) -> set[Node]:
    """Return the nodes that lie behind ``roots``, those of ``stops`` included, but nothing behind them."""
    reached: set[Node] = set()
    ahead = list(roots)
    while ahead:
        node = ahead.pop()
        if node in reached:
            continue
        reached.add(node)
        if node not in stops:
            ahead += [after for after, _ in node.next_functions if after is not None]
    return reached
