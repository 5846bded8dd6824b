"""Swap parameters of a running optimizer when layers change between dense and low rank."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.low_rank.factors.layers import LowRankLayer

# How a state entry depends on the gradient: linearly, by squares, or not at all.
_FIRST = ("momentum_buffer", "exp_avg", "grad_avg")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
_MEAN_OF = {
    "exp_avg_sq": "exp_avg",
    "square_avg": "grad_avg",
}  # second moment to the first moment of the same gradients
_LARGEST = ("exp_inf",)  # running maximum of absolute gradients
_COUNTERS = ("step", "mu_product")

State = Mapping[str, Any]  # what an optimizer keeps of one parameter
ProjectState = Callable[[State, LowRankLayer, Mapping[str, Any]], dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Replacement:
    """What `replace_parameters` did, and what is needed to undo it.

    Attributes:
        projected: Number of parameters whose moments were carried over.
        fresh: Why moments were not carried over, one line a layer; empty if all were.
        optimizer: Was changed.
        factors: Dense weight that the optimizer held, to the factors that took its place.
        states: The states of the dense weights, as they were.
    """

    projected: int
    fresh: tuple[str, ...]
    optimizer: torch.optim.Optimizer
    factors: dict[nn.Parameter, tuple[nn.Parameter, ...]]
    states: dict[nn.Parameter, dict[str, Any]]


def replace_parameters(
    optimizer: torch.optim.Optimizer,
    replaced: Mapping[nn.Parameter, LowRankLayer],
    *,
    project: ProjectState | None = None,
) -> Replacement:
    r"""Let factors take the place of dense weights in their parameter groups, and project the moments.

    With ``W = U V``, gradients of the factors are ``dU = G V^T`` and ``dV = U^T G``. So a first moment M of the weight
    becomes ``M V^T`` and ``U^T M``. A second moment v is an average of squares: its variance ``v - M^2`` becomes
    ``(v - M^2) (V*V)^T`` (entries of G taken as uncorrelated), and the square of the new first moment is added, so that
    no variance is negative. Running maxima m become ``m |V|^T``, a bound. For Tucker-2 the same holds with the
    derivatives of its product. Step counters are copied. A state with entries that are not known starts fresh, and the
    result says so. RMSprop's momentum is a sum of normalized gradients, which no projection keeps: it starts at zero.
    The lists of parameters are changed in place, for optimizers that keep them elsewhere, too.

    Args:
        optimizer: Holds the dense weights; changed in place. Group options, order and other states stay.
        replaced: Dense weight to the factored layer that replaces it. Weights that are not in the optimizer are
            ignored, as an optimizer may own a part of the model only.
        project: Makes the factors' states; None is `project_state`.

    Returns:
        What was done; `undo_replacement` takes it back.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_accel.low_rank import factorize, replace_parameters
        >>> dense = nn.Linear(64, 32)
        >>> optimizer = torch.optim.AdamW(dense.parameters())
        >>> layer = factorize(dense, (8,))
        >>> _ = replace_parameters(optimizer, {dense.weight: layer})
        >>> any(parameter is layer.factor_in for parameter in optimizer.param_groups[0]["params"])
        True
    """
    lists = [list(group["params"]) for group in optimizer.param_groups]
    held = {parameter for group in lists for parameter in group}
    states = {weight: dict(optimizer.state[weight]) for weight in replaced if weight in optimizer.state}
    fresh: list[str] = []
    projected = 0

    def factors_with_names(parameter: nn.Parameter, name: str) -> list[tuple[nn.Parameter, str]]:
        if parameter not in replaced:
            return [(parameter, name)]
        layer, place = replaced[parameter], name.removesuffix("weight")
        return [(getattr(layer, factor), place + factor) for factor in layer.factor_names]

    for group in optimizer.param_groups:
        _rewrite(group, factors_with_names)
    options = {
        parameter: group for group, held in zip(optimizer.param_groups, lists, strict=True) for parameter in held
    }
    for weight, layer in replaced.items():
        state = optimizer.state.pop(weight, None) if weight in held else None
        if not state:
            continue
        problem = _unknown(weight, state)
        if problem:
            fresh.append(f"{tuple(weight.shape)}: {problem}")
            continue
        for name, factor_state in (project or project_state)(state, layer, options[weight]).items():
            optimizer.state[getattr(layer, name)] = factor_state
            projected += 1
    factors = {weight: _factors_of(layer) for weight, layer in replaced.items() if weight in held}
    return Replacement(projected, tuple(fresh), optimizer, factors, states)


def undo_replacement(replacement: Replacement, weights: Collection[nn.Parameter] | None = None) -> None:
    """Put the dense weights and their states back, as they were when `replace_parameters` was called.

    Steps that the optimizer took in between on the factors are forgotten; whatever else it holds stays as it is now.

    Args:
        replacement: What was done.
        weights: Those to put back; None puts all back.
    """
    wanted = {id(weight) for weight in (replacement.factors if weights is None else weights)}
    for weight, factors in replacement.factors.items():
        if id(weight) in wanted:
            put_weight(replacement.optimizer, factors, weight)
            if weight in replacement.states:
                replacement.optimizer.state[weight] = replacement.states[weight]


def put_weight(optimizer: torch.optim.Optimizer, factors: Sequence[nn.Parameter], weight: nn.Parameter) -> bool:
    """Let a dense weight, without a state, take the place of the first of its factors; return whether it had one."""
    first, *others = factors
    if any(parameter is weight for group in optimizer.param_groups for parameter in group["params"]):
        others = list(factors)  # somebody has put it there already

    def weight_with_name(parameter: nn.Parameter, name: str) -> list[tuple[nn.Parameter, str]]:
        if any(parameter is other for other in others):
            return []
        return [(weight, name.removesuffix("factor_in") + "weight") if parameter is first else (parameter, name)]

    for group in optimizer.param_groups:
        _rewrite(group, weight_with_name)
    states = [optimizer.state.pop(factor, None) for factor in factors]
    return any(states)


def _rewrite(
    group: dict[str, Any], rewritten: Callable[[nn.Parameter, str], Sequence[tuple[nn.Parameter, str]]]
) -> None:
    """Change a group's parameters in place, and their names, if they have any (``Adam(model.named_parameters())``)."""
    names = group.get("param_names") or [""] * len(group["params"])
    pairs = [pair for p, name in zip(group["params"], names, strict=True) for pair in rewritten(p, name)]
    group["params"][:] = [parameter for parameter, _ in pairs]
    if "param_names" in group:
        group["param_names"][:] = [name for _, name in pairs]


def project_state(state: State, layer: LowRankLayer, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the optimizer state of each factor by name, from the dense weight's state; see `replace_parameters`."""
    factors = {name: getattr(layer, name).detach() for name in layer.factor_names}
    squares = {name: factor.square() for name, factor in factors.items()}
    sizes = {name: factor.abs() for name, factor in factors.items()}
    moments = {
        key: pull_back(factors, value)
        for key, value in state.items()
        if value is not None and key in _FIRST and not ("square_avg" in state and key == "momentum_buffer")
    }
    for key, value in state.items():
        if value is None or key in moments or key not in _FIRST + _SECOND + _LARGEST:
            continue
        if key in _FIRST:
            moments[key] = {name: torch.zeros_like(factor) for name, factor in factors.items()}
        elif (mean := _MEAN_OF.get(key)) in moments:
            first, second = _corrections(state, options)
            spread = (value / second - (state[mean] / first).square()).clamp_min(0.0)
            moments[key] = {
                name: second * (variance + (moments[mean][name] / first).square())
                for name, variance in pull_back(squares, spread).items()
            }
        else:
            moments[key] = pull_back(squares if key in _SECOND else sizes, value)
    result = {name: _of_one_factor(state, {key: moments[key][name] for key in moments}) for name in factors}
    for entry in result.values():
        if entry.get("max_exp_avg_sq") is not None:
            entry["max_exp_avg_sq"] = torch.maximum(entry["max_exp_avg_sq"], entry["exp_avg_sq"])
    return result


def state_alike(state: State, layer: LowRankLayer, _options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return states of the factors' shapes, every moment its mean over the weight: for steps that are only timed."""
    means = {
        key: value.mean() for key, value in state.items() if value is not None and key in _FIRST + _SECOND + _LARGEST
    }
    factors = {name: getattr(layer, name).detach() for name in layer.factor_names}
    return {
        name: _of_one_factor(state, {key: torch.ones_like(factor).mul_(mean) for key, mean in means.items()})
        for name, factor in factors.items()
    }


def _of_one_factor(state: State, moments: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return one factor's state: its moments, and copies of the weight's counters, in the order of the weight's."""
    return {
        key: moments[key] if key in moments else value.clone() if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def _corrections(state: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[float, float]:
    """Return the sums of the weights in Adam's running averages, which have not seen enough steps to reach 1."""
    betas, steps = options.get("betas"), float(state.get("step", 0))
    if "exp_avg" not in state or betas is None or steps < 1:
        return 1.0, 1.0
    return 1.0 - float(betas[0]) ** steps, 1.0 - float(betas[1]) ** steps


def orphans(optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names of trainable parameters that no optimizer holds: they would never be trained."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in parameters.items() if p.requires_grad and id(p) not in held]


def _factors_of(layer: LowRankLayer) -> tuple[nn.Parameter, ...]:
    return tuple(getattr(layer, name) for name in layer.factor_names)


def pull_back(point: Mapping[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    """Apply the transposed derivative of the factors' product at ``point`` to ``cotangent``, of the weight's shape."""
    left, right = point["factor_out"].flatten(1), point["factor_in"].flatten(1)
    weight = cotangent.to(left.dtype).flatten(1)
    below = left.T @ weight  # (r2 or r, in * kernel)
    if "core" not in point:
        found = {"factor_in": below, "factor_out": weight @ right.T}
    else:
        core = point["core"].flatten(2)  # (r2, r1, kernel)
        below = below.view(core.shape[0], right.shape[1], core.shape[2])
        found = {
            "factor_in": torch.einsum("bak,bik->ai", core, below),
            "core": torch.einsum("bik,ai->bak", below, right),
            "factor_out": weight @ torch.einsum("bak,ai->bik", core, right).flatten(1).T,
        }
    return {name: found[name].reshape(factor.shape) for name, factor in point.items()}


def _unknown(weight: Tensor, state: Mapping[str, Any]) -> str | None:
    for key, value in state.items():
        if key in _COUNTERS or value is None:
            continue
        if key not in _FIRST + _SECOND + _LARGEST:
            return f"the state entry `{key}` is unknown, moments start fresh"
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            return f"the state entry `{key}` has another shape than the weight, moments start fresh"
    return None
