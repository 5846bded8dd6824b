"""Remove zero groups physically: a smaller dense model that computes the same."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from lightning_accel.projection.shrink.channels import (
    PRUNABLE,
    SelectedFeatures,
    Use,
    copied,
    dead_inputs,
    fold_constants,
    observe_inputs,
    removable_channels,
    shared_modules,
    without,
)


@dataclass
class Shrunk:
    """What `shrink` returns.

    Attributes:
        model: The smaller model; the one that was given is untouched. Make a new optimizer for it: moments of the old
            one have other shapes.
        kept: Output channels that stayed, as indices into the original layer, by module name.
        features: Input features that are read, as indices into the last dimension of the input; ``None`` if all are.
            The model selects them itself, so its signature stays.
        features_before: How many features the layer of ``features`` read; ``None`` likewise.
        left: Why zero channels of a layer could not be removed, by module name.
        parameters_before: Entries of all parameters.
        parameters_after: As ``parameters_before``.
        largest_difference: Between outputs on the example and on a perturbed one, relative to the largest output.
    """

    model: nn.Module
    kept: dict[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    features_before: int | None = None
    left: dict[str, str] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0
    largest_difference: float = 0.0


# largest difference of outputs, relative to the largest output; other sums round anew
_TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TOLERANCE = 1e-5


def shrink(model: nn.Module, example_inputs: Any, *, tolerance: float | None = None) -> Shrunk:
    r"""Return a smaller model without the channels that are zero, and check that it computes the same.

    A channel goes, in all layers that share it (residual adds, flattening, norms), if every layer that writes it has
    a zero row, or every layer that reads it a zero column. A zero row with a bias still emits :math:`act(b)`; such
    constants are measured where they are read and folded into the next bias. What cannot be removed exactly stays,
    with the reason in ``left``: channels that a normalization over channels, attention heads or a padded convolution
    (whose border sees 0 instead of the constant) mixes, tied weights, network outputs. A layer that is zero
    altogether keeps one channel. Input features with zero columns are no longer read.

    Args:
        model: Any module; copied, taken as it was before ``torch.compile``, and evaluated in ``eval`` mode.
        example_inputs: One tensor, or the tuple of ``forward``'s arguments. Floating-point tensors are also perturbed,
            so that what is constant by chance is not taken for constant.
        tolerance: Largest difference of outputs, relative to the largest output, > 0; groups beyond it stay. By
            default 1e-5; 5e-2 for models with bfloat16 parameters, 1e-2 with float16.

    Raises:
        ImportError: Without torch-pruning (the extra ``shrink``), which knows how layers depend on each other.
        ValueError: If ``tolerance`` is not > 0, or a tensor of ``example_inputs`` is empty.

    Complexity: A few forward passes and one copy of the model a group of dependent layers.
    """
    if tolerance is None:
        tolerance = max([_TOLERANCES.get(p.dtype, _TOLERANCE) for p in model.parameters()], default=_TOLERANCE)
    if not tolerance > 0.0:
        raise ValueError(f"`tolerance` must be > 0, got {tolerance}.")
    pruning = _torch_pruning()
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if any(isinstance(x, Tensor) and not x.numel() for x in pytree.tree_leaves(inputs)):
        raise ValueError("`example_inputs` must hold at least one sample, got an empty tensor.")
    work = _before_compiling(copy.deepcopy(model)).eval()
    for parameter in work.parameters():
        parameter.requires_grad_(True)  # the dependency graph follows autograd
    probes = (inputs, _perturbed(inputs))
    shrinking = _Shrinking(pruning, work, probes, [_outputs(work, p) for p in probes], tolerance)
    for name in list(shrinking.kept):
        shrinking.remove_channels(name)
    features, features_before = shrinking.select_features()
    result, off = shrinking.model, shrinking.difference()
    _restore_flags(model, result)
    return Shrunk(
        model=result,
        kept=shrinking.kept,
        features=features,
        features_before=features_before,
        left=shrinking.left,
        parameters_before=_entries(model),
        parameters_after=_entries(result),
        largest_difference=off,
    )


# whatever a model's own ``forward`` raises where it counts on its sizes, or torch-pruning on a module it does not know
_ANYTHING = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


@dataclass
class _Shrinking:
    """A model that gets smaller step by step; a step that changes the outputs is taken back."""

    pruning: Any
    model: nn.Module
    probes: Sequence[tuple[Any, ...]]
    expected: Sequence[list[Tensor]]
    tolerance: float
    kept: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    graph: Any = None
    observed: list[dict[nn.Module, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, layer in self.model.named_modules():
            if isinstance(layer, PRUNABLE):
                self.kept[name] = torch.arange(layer.weight.shape[0])

    def remove_channels(self, root: str) -> None:
        """Remove what can go of the channels that the layer ``root`` writes."""
        self._look()
        layer = self.model.get_submodule(root)
        assert isinstance(layer, PRUNABLE)
        channels = layer.weight.shape[0]
        dead = bool((layer.weight == 0).flatten(1).all(1).any())
        uses = self._uses(layer, list(range(channels)))
        if isinstance(uses, str):
            if dead:
                self.left[root] = uses
            return
        shared = shared_modules(self.model) & {use.module for use in uses}
        gone, constants, why = removable_channels(uses, channels, self.observed)
        if shared and bool(gone.any()):
            gone, why = torch.zeros_like(gone), "its weights are tied to another layer's"
        if why and dead:
            self.left[root] = why
        if not bool(gone.any()):
            return
        before = copy.deepcopy(self.model), dict(self.kept)
        names = {module: name for name, module in self.model.named_modules()}
        try:
            fold_constants(uses, gone, constants)
            for use in uses:
                if not use.reads and use.module in names and names[use.module] in self.kept:
                    name = names[use.module]
                    self.kept[name] = without(self.kept[name], use.own[gone[use.root]])
            self._group(layer, gone.nonzero()[:, 0].tolist()).prune()
            off = self.difference()
            changes = f"the outputs by {off:.1e}" if off < float("inf") else "the shape of an output"
            problem = "" if off <= self.tolerance else f"removing them changes {changes}"
        except _ANYTHING as error:
            problem = f"the model does not run without them ({type(error).__name__})"
        if problem:
            self.model, self.kept = before
            self.left[root] = problem
        self.graph = None

    def select_features(self) -> tuple[Tensor | None, int | None]:
        """Let linear layers that read the network's input skip features without weights.

        Returns:
            What the first of them reads, and of how many features; ``None`` if all read all.
        """
        self._look()
        leaves = [x for x in pytree.tree_leaves(self.probes[1]) if isinstance(x, Tensor) and x.is_floating_point()]
        features, before = None, None
        for name, layer in list(self.model.named_modules()):
            seen = self.observed[1].get(layer)
            if not isinstance(layer, nn.Linear) or seen is None or layer in shared_modules(self.model):
                continue
            if is_parametrized(layer):
                continue
            first = any(x.numel() == seen.numel() and torch.equal(x.flatten(), seen.flatten()) for x in leaves)
            dead = dead_inputs(layer)
            if not first or not bool(dead.any()) or not name or bool(dead.all()):
                continue
            index = torch.nonzero(~dead)[:, 0]
            if features is None:
                features, before = index, layer.in_features
            layer.weight = nn.Parameter(layer.weight.detach()[:, index].contiguous())
            layer.in_features = len(index)
            path, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(path), leaf, SelectedFeatures(index, layer))
        return features, before

    def difference(self) -> float:
        """Return the largest difference of outputs to those of the model at the start, relative to the largest."""
        off = 0.0
        for probe, expected in zip(self.probes, self.expected, strict=True):
            for was, now in zip(expected, _outputs(self.model, probe), strict=True):
                if was.shape != now.shape:
                    return float("inf")
                if was.numel():
                    scale = max(float(was.abs().max()), torch.finfo(was.dtype).tiny)
                    off = max(off, float((was - now).abs().max()) / scale)
        return off

    def _look(self) -> None:
        if self.graph is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # parameters outside modules; groups that hold one are left alone
                graph = self.pruning.DependencyGraph()
                self.graph = graph.build_dependency(self.model, copied(self.probes[0]))
            self.observed = [observe_inputs(self.model, p) for p in self.probes]

    def _group(self, layer: nn.Module, channels: list[int]) -> Any:
        functions = self.pruning.prune_linear_out_channels, self.pruning.prune_conv_out_channels
        return self.graph.get_pruning_group(layer, functions[not isinstance(layer, nn.Linear)], idxs=channels)

    def _uses(self, layer: nn.Module, channels: list[int]) -> list[Use] | str:
        """Return who takes part in a group of channels, or why nobody knows."""
        try:
            group = self._group(layer, channels)
        except ValueError:
            return "it is not called as a module"
        except _ANYTHING as error:
            return f"its channels go where they can not be followed ({type(error).__name__})"
        return [
            Use(
                name=item.dep.target.name.split(" (")[0],
                module=item.dep.target.module,
                reads=not self.graph.is_out_channel_pruning_fn(item.dep.handler),
                own=torch.as_tensor(item.idxs),
                root=torch.as_tensor(item.root_idxs),
            )
            for item in group
        ]


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise ImportError("`shrink` needs torch-pruning: pip install 'lightning-accel[shrink]'.") from None
    return torch_pruning


def _perturbed(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def perturb(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x + torch.randn(x.shape, generator=generator).to(x)

    perturbed: tuple[Any, ...] = pytree.tree_map(perturb, inputs)
    return perturbed


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(*copied(inputs)))
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _entries(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _before_compiling(model: nn.Module) -> nn.Module:
    """Take compiled modules out of their wrappers, which nobody can look into."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    for name, child in model.named_children():
        setattr(model, name, _before_compiling(child))
    return model


def _restore_flags(model: nn.Module, smaller: nn.Module) -> None:
    """Give the copy the training modes and frozen parameters of the original."""
    trainable = {name.replace("_orig_mod.", ""): p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(trainable.get(name.replace(".layer.", "."), True))
        parameter.grad = None
    modes = {name.replace("_orig_mod.", ""): module.training for name, module in model.named_modules()}
    for name, module in smaller.named_modules():
        module.training = modes.get(name, modes.get(name.removesuffix(".layer"), model.training))
