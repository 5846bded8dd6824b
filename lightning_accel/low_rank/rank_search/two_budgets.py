"""The multiple-choice knapsack with two budgets: most value, where a plan within both is known already."""

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

Options = Sequence[Sequence[tuple[float, float, float]]]
"""For each layer its options as (first cost, second cost, value)."""

_STATES = 600
_STEPS = 120
_SLACK = 1e-12


def most_value_within(
    options: Options, budgets: tuple[float, float], start: Sequence[int], *, states: int = _STATES
) -> list[int]:
    """Choose one option a layer so that the values sum up to the most and both costs stay within their budgets.

    Dynamic programming over partial choices. A partial choice is dropped if another one is at least as good in all
    three sums, or if even the bound of the Lagrange relaxation, ``value + price . (budget left) + sum over the rest of
    max (value - price . cost)``, is no better than the best complete choice that is known. More than ``states`` partial
    choices are cut to those of the highest bound; up to there the answer is exact. It is never worse than ``start``.

    Args:
        options: At least one option a layer.
        budgets: Largest sums of the costs.
        start: A choice within the budgets.
        states: Most partial choices that are kept, >= 1.
    """
    tables = [torch.tensor(layer, dtype=torch.float64) for layer in options]
    limits = torch.tensor(budgets, dtype=torch.float64)
    scale = limits.abs().clamp_min(1e-300)
    tables = [torch.cat([table[:, :2] / scale, table[:, 2:]], 1) for table in tables]  # budgets are 1 from here on
    limits = limits / scale + _SLACK
    best, best_value = list(start), _sums(tables, start)[2]
    price, found = _prices(tables, limits)
    if found is not None and (value := _sums(tables, found)[2]) > best_value:
        best, best_value = found, value
    rest = _rest(tables, price)
    reached = torch.zeros(1, 3, dtype=torch.float64)
    trace: list[tuple[Tensor, Tensor]] = []
    for index, table in enumerate(tables):
        new = (reached[:, None, :] + table).flatten(0, 1)
        bound = new[:, 2] + (limits - new[:, :2]) @ price + rest[index + 1]
        keep = ((new[:, :2] <= limits).all(1) & (bound > best_value + _SLACK)).nonzero().flatten()
        if not len(keep):
            return best
        keep = keep[_undominated(new[keep])]
        if len(keep) > states:
            keep = keep[bound[keep].topk(states).indices]
        trace.append((keep // len(table), keep % len(table)))
        reached = new[keep]
    state = int(reached[:, 2].argmax())
    if reached[state, 2] <= best_value:
        return best
    chosen: list[int] = []
    for parent, option in reversed(trace):
        chosen.append(int(option[state]))
        state = int(parent[state])
    return chosen[::-1]


def _sums(tables: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
    return torch.stack([table[k] for table, k in zip(tables, chosen, strict=True)]).sum(0)


def _rest(tables: Sequence[Tensor], price: Tensor) -> list[float]:
    """Return for each layer the most that it and those after it add to the relaxation's bound."""
    gains = [float((table[:, 2] - table[:, :2] @ price).max()) for table in tables]
    return [sum(gains[index:]) for index in range(len(tables) + 1)]


def _prices(tables: Sequence[Tensor], limits: Tensor) -> tuple[Tensor, list[int] | None]:
    """Lower the relaxation's bound by subgradient steps; return its prices and the best choice met within budgets."""
    price, best_price = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    lowest, most, found = float("inf"), -float("inf"), None
    size = float(sum(table[:, 2].max() - table[:, 2].min() for table in tables)) or 1.0
    for step in range(_STEPS):
        chosen = [int((table[:, 2] - table[:, :2] @ price).argmax()) for table in tables]
        sums = _sums(tables, chosen)
        left = limits - sums[:2]
        bound = float(sums[2] + left @ price)
        if bound < lowest:
            lowest, best_price = bound, price.clone()
        if bool((left >= 0.0).all()) and float(sums[2]) > most:
            most, found = float(sums[2]), chosen
        length = float(left.norm())
        if length == 0.0:
            break
        price = (price - size / (1.0 + step) * left / length).clamp_min(0.0)
    return best_price, found


def _undominated(points: Tensor) -> Tensor:
    """Return the indices of points that no other one beats in both costs and the value (the first of equal ones)."""
    rows = points.tolist()
    kept: list[int] = []
    costs: list[float] = []  # a staircase: of those kept so far, second costs and the most value up to each
    values: list[float] = []
    for index in sorted(range(len(rows)), key=lambda i: (rows[i][0], rows[i][1], -rows[i][2])):
        _, cost, value = rows[index]
        place = bisect_right(costs, cost)
        if place and values[place - 1] >= value:
            continue
        kept.append(index)
        end = place
        while end < len(costs) and values[end] <= value:
            end += 1
        start = place - 1 if place and costs[place - 1] == cost else place
        costs[start:end], values[start:end] = [cost], [value]
    return torch.tensor(kept)
