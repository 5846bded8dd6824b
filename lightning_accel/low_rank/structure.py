"""Make a model's structure fit a state dict that is about to be loaded: keys and shapes tell all."""

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor, nn

from lightning_accel.low_rank.decompose import swap
from lightning_accel.low_rank.eligibility import low_rank_layers
from lightning_accel.low_rank.factors.factored import DenseLayer
from lightning_accel.low_rank.factors.factorize import empty_like, factorize, to_dense
from lightning_accel.low_rank.factors.layers import LowRankLayer

_DENSE_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d)


def adapt_structure(
    model: nn.Module, state_dict: MutableMapping[str, Any], prefix: str = "", *, keep_low_rank: bool = False
) -> list[str]:
    """Change layers of ``model`` in place so that ``state_dict`` loads strictly.

    A dense layer ``n`` becomes low rank where ``n.factor_in`` is incoming; a low-rank layer takes the incoming ranks;
    a low-rank layer becomes dense where ``n.weight`` is incoming. Values are left to the load that follows. Layers
    whose structure fits keep their identity and their Parameters, so optimizers stay attached to them.

    Args:
        model: Changed in place.
        state_dict: Incoming; edited only with ``keep_low_rank``.
        prefix: In front of the model's own keys, as a `register_load_state_dict_pre_hook` hook receives it.
        keep_low_rank: Keep low-rank layers although a dense weight comes in, and replace that weight in ``state_dict``
            by its factors at the layer's present ranks.

    Returns:
        Names of the layers that were changed, or whose entries were factorized.

    Raises:
        ValueError: If a layer's incoming factors do not fit its sizes (before anything is changed).

    Example:
        >>> from torch import nn
        >>> from lightning_accel.low_rank import adapt_structure, decompose, make_plan
        >>> trained = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> _ = decompose(trained, make_plan(trained, None, ratio=2.0, method="fixed"))
        >>> fresh = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> changed = adapt_structure(fresh, trained.state_dict())
        >>> fresh.load_state_dict(trained.state_dict())
        <All keys matched successfully>
    """
    made: dict[str, nn.Module] = {}
    rewritten: list[str] = []
    for name, module in model.named_modules():
        key = f"{prefix}{name}." if name else prefix
        if isinstance(module, _DENSE_TYPES) and f"{key}factor_in" in state_dict:
            made[name] = _from_factors(module, name, state_dict, key)
    for name, layer in low_rank_layers(model).items():
        key = f"{prefix}{name}." if name else prefix
        if f"{key}factor_in" in state_dict:
            resized = _from_factors(layer, name, state_dict, key)
            if resized.ranks != layer.ranks:
                made[name] = resized
        elif f"{key}weight" in state_dict:
            if keep_low_rank:
                _factorize_entries(layer, state_dict, key)
                rewritten.append(name)
            else:
                made[name] = to_dense(layer)
    for name, replacement in made.items():
        swap(model, name, replacement)
    return [*made, *rewritten]


def _from_factors(
    layer: DenseLayer | LowRankLayer, name: str, state_dict: MutableMapping[str, Any], key: str
) -> LowRankLayer:
    """Return a layer of the incoming ranks with the settings of ``layer``."""
    dense = layer if isinstance(layer, _DENSE_TYPES) else to_dense(layer)
    incoming: dict[str, Tensor] = {
        part: state_dict[key + part] for part in ("factor_in", "core", "factor_out") if key + part in state_dict
    }
    ranks: tuple[int, ...] = (incoming["factor_in"].shape[0],)
    if "core" in incoming:
        ranks = (*ranks, incoming["core"].shape[0])
    try:
        made = empty_like(dense, ranks)
        expected = {part: tuple(getattr(made, part).shape) for part in made.factor_names}
    except ValueError as error:
        raise ValueError(f"the incoming factors of layer `{name}` do not fit it: {error}") from error
    actual = {part: tuple(tensor.shape) for part, tensor in incoming.items()}
    if actual != expected:
        raise ValueError(
            f"the incoming factors of layer `{name}` have shapes {actual}, it needs {expected}; "
            "load the checkpoint into the model it was saved from."
        )
    made.bias = layer._parameters["bias"]
    return made


def _factorize_entries(layer: LowRankLayer, state_dict: MutableMapping[str, Any], key: str) -> None:
    dense = to_dense(layer)
    dense.weight = nn.Parameter(state_dict.pop(f"{key}weight").detach().clone())
    factored = factorize(dense, layer.ranks)
    for part in factored.factor_names:
        state_dict[key + part] = getattr(factored, part).detach()
