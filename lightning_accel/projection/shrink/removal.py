"""A model that gets smaller group by group; a step that changes what it computes is taken back."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.projection.shrink.channels import (
    Removal,
    Use,
    find_removal,
    fold_constants,
    is_depthwise,
    shared_modules,
    without,
    zero_rows,
)
from lightning_accel.projection.shrink.features import can_select, reads_input, select_features
from lightning_accel.projection.shrink.keep_state import copy_module, keep_state
from lightning_accel.projection.shrink.nested import tensors_in, with_tensors
from lightning_accel.projection.shrink.probes import Probes
from lightning_accel.projection.shrink.readings import (
    PRUNABLE,
    Run,
    idle_modules,
    look,
    output_difference,
    reading_difference,
)

_NOT_CALLED = "it is not called as a module"


@dataclass
class Shrinking:
    """The state of a model that is being made smaller.

    Attributes:
        pruning: The library torch-pruning.
        model: Gets smaller, in place where that works out.
        probes: Inputs on which it must compute what it did.
        tolerance: Of outputs, relative to the largest.
        kept: Output channels that are left of each layer, by module name.
        left: Why zero channels of a layer stay, by module name.
        features: What the first layer whose input features were selected reads.
        features_before: Of how many.
        barred: Layers that are not to be changed, with the reason.
    """

    pruning: Any
    model: nn.Module
    probes: Probes
    tolerance: float
    barred: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    features: Tensor | None = None
    features_before: int | None = None

    def __post_init__(self) -> None:
        for name, layer in self.model.named_modules():
            if isinstance(layer, PRUNABLE) and isinstance(layer.weight, Tensor) and layer.weight.numel():
                self.kept[name] = torch.arange(layer.weight.shape[0], device="cpu")
        self.first = [look(self.model, p) for p in self.probes.inputs]
        self.runs: Sequence[Run] = self.first
        called = frozenset[str]().union(*(run.called for run in self.first))
        self._idle = idle_modules(self.model, self.probes.inputs[0], called)
        self._graph: Any = None
        self._why_no_graph = ""

    def shrink(self) -> None:
        """Remove what can go of every layer."""
        for name in list(self.kept):
            self.remove_channels(name)
        for name in list(self.kept):
            self.select_features(name)
        for name in self.kept:
            layer = self.model.get_submodule(name)
            if name not in self.left and bool(zero_rows(layer).any()):
                self.left[name] = "other channels depend on it"

    def remove_channels(self, root: str) -> None:
        """Remove what can go of the channels that the layer ``root`` writes."""
        layer = self.model.get_submodule(root)
        found = self._find(root, layer)
        if isinstance(found, str):
            if bool(zero_rows(layer).any()):
                self.left[root] = found
            return
        uses, removal = found
        if removal.why and bool(zero_rows(layer).any()):
            self.left[root] = removal.why
        if not bool(removal.gone.any()):
            return
        before = copy_module(self.model), dict(self.kept)
        try:
            fold_constants(uses, removal)
            read: dict[str, Tensor] = {}
            for use in uses:
                going = use.own[removal.gone[use.root]]
                if use.reads or is_depthwise(use.module):
                    read[use.name] = torch.cat([read[use.name], going]) if use.name in read else going
                if not use.reads and use.name in self.kept:
                    self.kept[use.name] = without(self.kept[use.name], going)
            self._group(layer, removal.gone.nonzero()[:, 0].tolist()).prune()
            problem = self._check(read)
        except Exception as error:  # of a model that counts on its sizes, or of torch-pruning
            problem = f"the model does not run without them ({type(error).__name__})"
        self._graph = None
        if problem:
            self.model, self.kept = before
            self.left[root] = problem

    def select_features(self, name: str) -> None:
        """Let a linear layer that reads the network's input skip features without weights."""
        layer = self.model.get_submodule(name)
        reading = self.runs[-1].readings.get(name)
        readings = [run.readings.get(name) for run in self.runs]
        if not name or not can_select(layer) or reading is None or layer in shared_modules(self.model):
            return
        for inputs, found in zip(self.probes.inputs, readings, strict=True):
            leaves = [x for x in tensors_in(inputs) if x.is_floating_point()]
            if found is None or not reads_input(found.rows, leaves):
                return
        assert isinstance(layer, nn.Linear)
        before, width = copy_module(self.model), layer.in_features
        index = select_features(layer)
        try:
            problem = self._check({})
        except Exception as error:  # of a model that reads the weight by itself
            problem = f"the model does not run if it reads fewer features ({type(error).__name__})"
        self._graph = None
        if problem:
            self.model = before
            self.left.setdefault(name, problem)
        elif self.features is None:
            self.features, self.features_before = index, width

    def difference(self, runs: Sequence[Run] | None = None) -> float:
        """Return the largest difference of outputs to those of the model at the start, relative to the largest."""
        pairs = zip(self.first, self.runs if runs is None else runs, strict=True)
        return max(output_difference(was, now) for was, now in pairs)

    def _find(self, root: str, layer: nn.Module) -> tuple[list[Use], Removal] | str:
        if root in self.barred:
            return self.barred[root]
        try:
            uses = self._uses(layer, list(range(len(zero_rows(layer)))))
        except Exception as error:  # of torch-pruning, on what it does not know
            return f"its channels go where they can not be followed ({type(error).__name__})"
        if isinstance(uses, str):
            return uses
        removal = find_removal(layer, uses, self.runs, self.probes.fixed)
        if not bool(removal.gone.any()):
            return uses, removal
        if shared_modules(self.model) & {use.module for use in uses}:
            return "its weights are tied to another layer's"
        idle = self._idle_reader(layer, uses)
        return idle or (uses, removal)

    def _idle_reader(self, layer: nn.Module, uses: Sequence[Use]) -> str:
        """Return why a layer that no probe calls may read the channels: in another branch, or in training only."""
        widths = {len(torch.unique(use.root)) for use in uses if not use.reads}
        widths |= {len(use.own) for use in uses if use.reads}
        for name in self._idle:
            module = self.model.get_submodule(name)
            for parameter in () if module is layer else module._parameters.values():
                if parameter is None or not parameter.dim():
                    continue
                sizes = parameter.shape[1:2] if isinstance(module, PRUNABLE) else parameter.shape
                if widths & set(sizes):
                    return f"`{name}`, which the example does not call, may read it elsewhere"
        return ""

    def _check(self, read: dict[str, Tensor]) -> str:
        """Run the smaller model; return what differs, or keep the runs."""
        runs = [look(self.model, p) for p in self.probes.inputs]
        off = self.difference(runs)
        if not off <= self.tolerance:
            what = f"the outputs by {off:.1e}" if off < math.inf else "the shape of an output"
            return f"removing them changes {what}"
        for was, now in zip(self.runs, runs, strict=True):
            name, inside = reading_difference(was, now, read)
            if not inside <= self.tolerance:
                return f"removing them changes what `{name}` reads"
        self.runs = runs
        return ""

    def _uses(self, layer: nn.Module, channels: list[int]) -> list[Use] | str:
        """Return who takes part in a group of channels, or why nobody knows."""
        self._build_graph()
        if self._why_no_graph:
            return self._why_no_graph
        names: dict[nn.Module, str] = {}
        for name, module in self.model.named_modules():
            names.setdefault(module, name)
        try:
            group = self._group(layer, channels)
        except ValueError:
            return _NOT_CALLED
        return [
            Use(
                name=names.get(item.dep.target.module, item.dep.target.name.split(" (")[0]),
                module=item.dep.target.module,
                reads=not self._graph.is_out_channel_pruning_fn(item.dep.handler),
                own=torch.as_tensor(item.idxs, dtype=torch.long, device="cpu"),
                root=torch.as_tensor(item.root_idxs, dtype=torch.long, device="cpu"),
            )
            for item in group
        ]

    def _group(self, layer: nn.Module, channels: list[int]) -> Any:
        functions = self.pruning.prune_linear_out_channels, self.pruning.prune_conv_out_channels
        return self._graph.get_pruning_group(layer, functions[not isinstance(layer, nn.Linear)], idxs=channels)

    def _build_graph(self) -> None:
        """Follow the example through the model; what can not be followed at all leaves every layer as it is."""
        if self._graph is not None or self._why_no_graph:
            return
        args, kwargs = with_tensors(self.probes.inputs[0], lambda x: x.detach().clone())
        graph = self.pruning.DependencyGraph()
        try:
            with warnings.catch_warnings(), keep_state(self.model), torch.enable_grad():
                warnings.simplefilter("ignore")  # parameters outside modules; groups that hold one are left alone
                self._graph = graph.build_dependency(
                    self.model,
                    args,
                    forward_fn=lambda model, given: model(*given, **kwargs),
                    output_transform=_followed,
                )
        except Exception as error:  # of torch-pruning, or of a model that can not be run with gradients
            self._why_no_graph = f"the model's channels can not be followed ({type(error).__name__})"


def _followed(output: object) -> list[Tensor]:
    found = [x for x in tensors_in(output) if x.grad_fn is not None]
    if not found:
        raise ValueError("no output depends on a parameter.")
    return found
