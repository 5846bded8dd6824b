r"""Let an optimizer's steps move a product of factors as far as they would move the dense weight.

Adam and its kin move every entry by about the learning rate h, whatever the size of its gradient. A dense m x n weight
then moves by about ``h sqrt(m n)`` a step (Frobenius norm), a product U V by ``h sqrt(m |V|^2 + n |U|^2)``, which is
less: a half is usual. And decoupled weight decay shrinks the product once for each of its factors.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_accel.low_rank.factors.layers import LowRankLayer
from lightning_accel.low_rank.optimizers.exchange import pull_back

LARGEST_MULTIPLIER = 2.0**1.5
"""Bound: factors of a weight near zero would ask for any rate, and for a smaller one as soon as they have grown."""

_PER_DOUBLING = 4  # multipliers are powers of 2^(1/4): few of them, so that updates of many layers stay fused
_ENTRYWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adamax)


def why_not_matched(optimizer: torch.optim.Optimizer) -> str | None:
    """Say why an optimizer steps as it does by itself; None if its updates can be matched."""
    if type(optimizer) in _ENTRYWISE:
        return None
    names = ", ".join(kind.__name__ for kind in _ENTRYWISE)
    return f"{type(optimizer).__name__} is none of {names}, whose steps have the size of the learning rate"


@torch.no_grad()
def update_multiplier(layer: LowRankLayer) -> float:
    r"""Return what the factors' learning rate is multiplied by for the product to move as the dense weight would.

    That is ``sqrt(entries of the weight / sum of the product's squared derivatives)``, for two factors
    ``sqrt(m n / (m |V|^2 + n |U|^2))``, rounded to a power of ``2^(1/4)`` and kept between 1 and `LARGEST_MULTIPLIER`.
    For Tucker-2 the input and output factors count as if their columns were orthogonal, which a decomposition makes
    them.

    Args:
        layer: With the factors as they are now.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_accel.low_rank import factorize, update_multiplier
        >>> dense = nn.Linear(256, 256)
        >>> with torch.no_grad():
        ...     _ = nn.init.orthogonal_(dense.weight)
        >>> update_multiplier(factorize(dense, (64,)))  # |U|^2 = |V|^2 = 64: sqrt(256 / 128), the root of two
        1.4142135623730951
    """
    squares = {name: getattr(layer, name).detach().double().square() for name in layer.factor_names}
    ones = torch.ones_like(layer.product(squares))
    total = sum(float(derivatives.sum()) for derivatives in pull_back(squares, ones).values())
    if not total > 0.0:
        return LARGEST_MULTIPLIER
    exact = min(max(math.sqrt(ones.numel() / total), 1.0), LARGEST_MULTIPLIER)
    return float(2.0 ** (round(_PER_DOUBLING * math.log2(exact)) / _PER_DOUBLING))


class MatchedUpdates:
    """Gives factors a learning rate and a weight decay of their own while an optimizer steps, and only then.

    Between steps the optimizer's groups are as they were: schedules, checkpoints and whoever else reads or changes them
    see no difference, and the factors follow what they set. With a multiplier k and n factors the learning rate is k
    times that of the group, and decoupled weight decay is divided by k n, so that the product decays as the dense
    weight would. Without `remove`, the hooks stay as long as the optimizer.

    Args:
        optimizer: One that `why_not_matched` finds nothing against.
        multipliers: Layer to multiplier, see `update_multiplier`. Layers of other optimizers are ignored.

    Raises:
        ValueError: If the optimizer's updates can not be matched.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_accel.low_rank import MatchedUpdates, factorize, update_multiplier
        >>> layer = factorize(nn.Linear(64, 32), (8,))
        >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        >>> matched = MatchedUpdates(optimizer, {layer: update_multiplier(layer)})
        >>> layer(torch.randn(4, 64)).sum().backward()
        >>> optimizer.step()
        >>> len(optimizer.param_groups)  # as before
        1
    """

    def __init__(self, optimizer: torch.optim.Optimizer, multipliers: Mapping[LowRankLayer, float]) -> None:
        if why := why_not_matched(optimizer):
            raise ValueError(f"updates can not be matched: {why}.")
        self._optimizer = optimizer
        self._rates = {
            getattr(layer, name): (multiplier, len(layer.factor_names))
            for layer, multiplier in multipliers.items()
            for name in layer.factor_names
        }
        self._whole: list[tuple[dict[str, Any], list[nn.Parameter]]] = []  # groups that are split, and what they hold
        self._added = 0
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(lambda *_: self._join()),
            optimizer.register_state_dict_pre_hook(lambda *_: self._join()),  # of one that failed in a step
        ]

    def remove(self) -> None:
        """Let the optimizer step as it did before."""
        for handle in self._handles:
            handle.remove()
        self._rates = {}  # of a step whose closure removes this
        self._join()

    def _before_step(
        self, _optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Split the groups, after the closure if there is one: what runs in it sees them whole."""
        self._join()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._split()
            return None
        return args[:1], {**kwargs, "closure": self._then_split(closure)}

    def _then_split(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            result = closure()
            self._split()
            return result

        return run

    def _split(self) -> None:
        """Move the factors into groups of their own, one for each multiplier."""
        groups = self._optimizer.param_groups
        for group in list(groups):
            held = group["params"]
            own: dict[tuple[float, int], list[nn.Parameter]] = {}
            for parameter in held:
                if rate := self._rates.get(parameter):
                    own.setdefault(rate, []).append(parameter)
            if not own:
                continue
            self._whole.append((group, held))
            for (multiplier, factors), parameters in own.items():
                part = {**group, "params": parameters, "lr": group["lr"] * multiplier}
                if group.get("decoupled_weight_decay", False):
                    part["weight_decay"] = group["weight_decay"] / (multiplier * factors)
                groups.append(part)
                self._added += 1
            group["params"] = [parameter for parameter in held if parameter not in self._rates]

    def _join(self) -> None:
        """Undo `_split`."""
        if not self._whole:
            return
        for group, held in self._whole:
            group["params"] = held
        del self._optimizer.param_groups[-self._added :]
        self._whole, self._added = [], 0
