"""Remove zero groups physically: a smaller dense model that computes the same."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_accel.projection.shrink.features import SelectedFeatures
from lightning_accel.projection.shrink.keep_state import copy_module
from lightning_accel.projection.shrink.nested import tensors_in
from lightning_accel.projection.shrink.probes import Inputs, make_probes
from lightning_accel.projection.shrink.readings import forward, look, output_difference
from lightning_accel.projection.shrink.removal import Shrinking

# largest difference of outputs, relative to the largest output
_TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TOLERANCE = 1e-5
_ROUNDS = 3  # of looking anew, each with the inputs that showed a difference
_SEEDS = 1, 2, 3  # of the inputs that the result is checked on


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
        largest_difference: Between outputs on all inputs they were compared on, relative to the largest output.
        inputs_compared: How many inputs these were.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_accel.projection import shrink
        >>> found = shrink(nn.Sequential(nn.Linear(8, 2)), (torch.randn(3, 8),))
        >>> type(found).__name__
        'Shrunk'
    """

    model: nn.Module
    kept: dict[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    features_before: int | None = None
    left: dict[str, str] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0
    largest_difference: float = 0.0
    inputs_compared: int = 0


def shrink(
    model: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
) -> Shrunk:
    r"""Return a smaller model without the channels that are zero, and check that it computes the same.

    A channel goes, in all layers that share it (residual adds, flattening, norms), if every layer that writes it has
    a zero row, or every layer that reads it a zero column. A zero row with a bias still emits :math:`act(b)`; such
    constants are measured where they are read and folded into the next bias. What cannot be removed exactly stays,
    with the reason in ``left``: channels that a normalization over channels, attention heads, a gated unit or a padded
    convolution (whose border sees 0 instead of the constant) mixes, tied weights, network outputs, whatever depends
    on the input. A layer that is zero altogether keeps one channel. Input features with zero columns are no longer
    read.

    Outputs, and what layers read, are compared on the example and on a dozen variations of it (see `make_probes`):
    floating-point tensors with noise, masks and integers drawn anew, other batch sizes and lengths. A group whose
    removal changes any is put back. The result computes the same in ``eval`` mode. In training, dropout and batch
    norms no longer see the constants that were folded; train on with that in mind.

    Names, hooks, devices, types, training modes and ``requires_grad`` of all that is left stay.

    Args:
        model: Any module; copied, taken as it was before ``torch.compile``, and evaluated in ``eval`` mode.
        example_inputs: One tensor, or the tuple of ``forward``'s positional arguments, which may hold tensors in any
            containers and objects. (A named tuple, a list or a dict is one argument.)
        example_kwargs: Named arguments of ``forward``.
        tolerance: Largest difference of outputs, relative to the largest output, > 0; groups beyond it stay. By
            default 1e-5; 5e-2 for models with bfloat16 parameters, 1e-2 with float16.

    Raises:
        ImportError: Without torch-pruning (the extra ``shrink``), which knows how layers depend on each other.
        ValueError: If ``tolerance`` is not > 0, a tensor of ``example_inputs`` is empty, or the model has lazy layers
            that have no weights yet.

    Complexity: A dozen forward passes and one copy of the model a group of dependent layers that gets smaller.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_accel.projection import shrink
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[:4].zero_(), model[0].bias[:4].zero_()
        >>> shrink(model, (torch.randn(3, 8),)).model[0]
        Linear(in_features=8, out_features=12, bias=True)
    """
    if tolerance is None:
        tolerance = max([_TOLERANCES.get(p.dtype, _TOLERANCE) for p in model.parameters()], default=_TOLERANCE)
    if not tolerance > 0.0:
        raise ValueError(f"`tolerance` must be > 0, got {tolerance}.")
    pruning = _torch_pruning()
    several = isinstance(example_inputs, tuple) and not hasattr(example_inputs, "_fields")
    args = example_inputs if several else (example_inputs,)
    example: Inputs = args, dict(example_kwargs or {})
    if any(not x.numel() for x in tensors_in(example)):
        raise ValueError("`example_inputs` must hold at least one sample, got an empty tensor.")
    if any(is_lazy(p) for p in model.parameters()):
        raise ValueError("`model` has lazy layers that have no weights yet: call it once, then shrink it.")
    start = _trainable(_before_compiling(copy_module(model)).eval())
    result, others = _shrunk(pruning, start, example, tolerance)
    _restore(_names_before_compiling(model), result.model)
    return Shrunk(
        model=result.model,
        kept=result.kept,
        features=result.features,
        features_before=result.features_before,
        left=result.left,
        parameters_before=_entries(model),
        parameters_after=_entries(result.model),
        largest_difference=max(result.difference(), others.off),
        inputs_compared=len(result.probes.inputs) + others.count,
    )


@dataclass
class _Others:
    """A comparison on inputs that no decision was made on: how far outputs are off, on how many, and where."""

    off: float = 0.0
    count: int = 0
    different: list[Inputs] = field(default_factory=list)


def _shrunk(pruning: Any, start: nn.Module, example: Inputs, tolerance: float) -> tuple[Shrinking, _Others]:
    """Shrink and compare on inputs of other seeds; where those differ, begin again with them among the probes."""
    probes = make_probes(*example, lambda inputs: forward(start, inputs), seed=0)
    for _ in range(_ROUNDS):
        result = Shrinking(pruning, copy_module(start), probes, tolerance)
        result.shrink()
        others = _compared(start, result.model, example, tolerance)
        if not others.different:
            return result, others
        probes.inputs += others.different
    barred = dict.fromkeys(result.kept, "without it the outputs differed on random inputs")
    result = Shrinking(pruning, copy_module(start), probes, tolerance, barred=barred)
    for name in result.kept:
        result.remove_channels(name)
    return result, _compared(start, result.model, example, tolerance)


def _compared(was: nn.Module, now: nn.Module, example: Inputs, tolerance: float) -> _Others:
    found = _Others()
    if _entries(was) == _entries(now):
        return found
    for seed in _SEEDS:
        for inputs in make_probes(*example, lambda inputs: forward(was, inputs), seed=seed).inputs[1:]:
            found.count += 1
            try:
                off = output_difference(look(was, inputs), look(now, inputs))
            except Exception:  # whatever a model raises on sizes it does not expect
                off = float("inf")
            if not off <= tolerance:
                found.different.append(inputs)
            found.off = max(found.off, off)
    return found


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise ImportError("`shrink` needs torch-pruning: pip install 'lightning-accel[shrink]'.") from None
    return torch_pruning


def _entries(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _trainable(model: nn.Module) -> nn.Module:
    """Let all parameters require gradients: the dependency graph follows autograd."""
    for parameter in model.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    return model


def _before_compiling(model: nn.Module) -> nn.Module:
    """Take compiled modules out of their wrappers, which nobody can look into."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    for name, child in model._modules.items():
        if child is not None:
            model._modules[name] = _before_compiling(child)
    return model


def _names_before_compiling(model: nn.Module) -> dict[str, nn.Module]:
    named = model.named_modules(remove_duplicate=False)
    return {name.replace("_orig_mod.", "").removesuffix("_orig_mod").rstrip("."): module for name, module in named}


def _restore(originals: Mapping[str, nn.Module], smaller: nn.Module) -> None:
    """Give the copy the training modes, the frozen parameters and the parameters' attributes of the original."""
    for name, module in smaller.named_modules(remove_duplicate=False):
        original = originals.get(name)
        if original is None:
            continue
        module.training = original.training
        parameters = dict(original._parameters.items())  # of scripted modules, too, which have no `get`
        flags = [p.requires_grad for p in parameters.values() if p is not None]
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            was = parameters.get(leaf)
            # a bias that holds what was folded is as frozen as its layer
            parameter.requires_grad_(any(flags) if was is None else was.requires_grad)
            parameter.grad = None
            if was is not None:
                parameter.__dict__.update(was.__dict__)


__all__ = ["SelectedFeatures", "Shrunk", "shrink"]
