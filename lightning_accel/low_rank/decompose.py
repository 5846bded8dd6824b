"""Put factored layers into a model, and dense ones back."""

import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lightning_accel.low_rank.eligibility import LEFT_ALONE, eligible_layers, low_rank_layers
from lightning_accel.low_rank.factors.factored import FactoredLayer
from lightning_accel.low_rank.factors.factorize import factorize, to_dense
from lightning_accel.low_rank.factors.shared_vectors import SharedVectors
from lightning_accel.low_rank.in_place import become
from lightning_accel.low_rank.plan import RankPlan


def decompose(
    model: nn.Module,
    plan: RankPlan,
    *,
    second_moments: Mapping[str, Tensor] | None = None,
    shared: SharedVectors | None = None,
) -> list[str]:
    """Replace layers in place by their factored form, as planned; names, biases, hooks and modes stay.

    Layers that are low rank already are left as they are, so a second call changes nothing. Layers that could be
    factored but for what the model does with them (see `LEFT_ALONE`) stay dense, with a warning.

    Args:
        model: Changed in place, all or nothing: with an error no layer is replaced.
        plan: Says the ranks of each layer.
        second_moments: Name to mean of ``x x^T``, see `input_second_moments`; needed by a plan whose weighting is
            ``"activation"``.
        shared: What `make_plan` was given: vectors that it found for weights which are still the same are not computed
            again. A plan whose weighting is ``"activation"`` has none.

    Returns:
        Names of the layers that were replaced.

    Raises:
        ValueError: If a planned layer is missing from the model, can not be factored or has another shape than
            planned, if its weights are NaN or infinite, or if the plan needs ``second_moments`` that are not given.

    Example:
        >>> from torch import nn
        >>> from lightning_accel.low_rank import decompose, make_plan
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> names = list(decompose(model, make_plan(model, None, ratio=2.0, method="fixed")))
        >>> type(model[0]).__name__
        'LowRankLinear'
    """
    eligible, skipped = eligible_layers(model)
    factored = low_rank_layers(model)
    made: dict[str, nn.Module] = {}
    dense_by_harm: list[str] = []
    for entry in plan.layers:
        if entry.ranks is None or entry.name in factored:
            continue
        if entry.name not in eligible:
            why = skipped.get(entry.name, "no such linear or convolutional layer")
            if why.startswith(LEFT_ALONE):
                dense_by_harm.append(f"`{entry.name}` ({why.removeprefix(LEFT_ALONE)})")
                continue
            raise ValueError(f"layer `{entry.name}` of the plan can not be factored ({why}); make a new plan.")
        dense = eligible[entry.name]
        if tuple(dense.weight.shape) != entry.shape:
            raise ValueError(
                f"layer `{entry.name}` has shape {tuple(dense.weight.shape)}, the plan was made for {entry.shape}; "
                "make a new plan."
            )
        moment = None
        if plan.weighting == "activation":
            moment = (second_moments or {}).get(entry.name)
            if moment is None:
                raise ValueError(
                    f"the plan is weighted by activations; `second_moments` lacks `{entry.name}`: "
                    "pass the result of `input_second_moments`."
                )
        made[entry.name] = factorize(dense, entry.ranks, second_moment=moment, shared=shared)
    for name, layer in made.items():
        swap(model, name, layer)
    if dense_by_harm:
        warnings.warn(f"layers of the plan stay dense: {'; '.join(dense_by_harm)}.", stacklevel=2)
    return list(made)


def merge(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Replace factored layers in place by the dense layers they stand for.

    Args:
        model: Changed in place.
        names: Layers to merge; None merges all.

    Returns:
        Names of the layers that were merged.

    Raises:
        ValueError: If a name is no factored layer of the model.

    Example:
        >>> from torch import nn
        >>> from lightning_accel.low_rank import decompose, make_plan, merge
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> _ = decompose(model, make_plan(model, None, ratio=2.0, method="fixed"))
        >>> _ = merge(model)
        >>> type(model[0]).__name__
        'Linear'
    """
    factored = low_rank_layers(model)
    chosen = list(factored) if names is None else list(names)
    for name in chosen:
        if name not in factored:
            raise ValueError(f"`{name}` is no low-rank layer; there are {sorted(factored)}.")
    for name in chosen:
        swap(model, name, to_dense(factored[name]))
    return chosen


def swap(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Let the module ``name`` become ``layer`` and return a module that is what it was; see `become`.

    The module stays the same object: whoever else holds it (a list, a closure) has the new layer too.
    """
    place = model.get_submodule(name)
    before = become(place, layer)
    if isinstance(place, FactoredLayer):
        place.place = name
    return before
