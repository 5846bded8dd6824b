"""The multiple-choice knapsack: one option a layer, most value within a budget, or least cost for a value."""

from collections.abc import Sequence

import torch
from torch import Tensor

Options = Sequence[Sequence[tuple[float, float]]]
"""For each layer its options as (cost >= 0, value)."""

_STATES = 2000


def most_value(options: Options, budget: float, *, states: int = _STATES) -> list[int] | None:
    """Choose one option a layer so that the values sum up to the most with costs of at most ``budget``.

    Dynamic programming over the Pareto front of (cost, value). Fronts longer than ``states`` are thinned to the best
    point of each cost interval, so the answer always keeps within the budget and is exact for short fronts.

    Args:
        options: At least one option a layer.
        budget: Largest sum of costs.
        states: Longest front that is kept, >= 2.

    Returns:
        Index of the option a layer, or None if even the cheapest options cost more.

    Raises:
        ValueError: If a layer has no option or a cost is negative.
    """
    cost, value, trace = _front(options, budget, states)
    return _choices(trace, int(value.argmax())) if len(cost) else None


def least_cost(options: Options, min_value: float, *, states: int = _STATES) -> list[int] | None:
    """Choose one option a layer so that the costs sum up to the least with values of at least ``min_value``.

    Args:
        options: At least one option a layer.
        min_value: Smallest sum of values.
        states: As in `most_value`.

    Returns:
        Index of the option a layer, or None if the values can not sum up to so much.

    Raises:
        ValueError: If a layer has no option or a cost is negative.
    """
    everything = sum(max((cost for cost, _ in layer), default=0.0) for layer in options)
    _, value, trace = _front(options, everything * (1.0 + 1e-9), states)
    enough = (value >= min_value - 1e-12).nonzero().flatten()
    return _choices(trace, int(enough[0])) if len(enough) else None  # the front is sorted by cost


def _front(options: Options, budget: float, states: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the last Pareto front, cheapest first, and for each layer (parent state, option) of its states."""
    for index, layer in enumerate(options):
        if not layer:
            raise ValueError(f"`options` must have at least one entry a layer, layer {index} has none.")
        if min(cost for cost, _ in layer) < 0.0:
            raise ValueError(f"costs must be >= 0, layer {index} has {layer}.")
    cost, value = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    cheapest_rest = sum(min(c for c, _ in layer) for layer in options)
    slack = 1e-12 * max(1.0, abs(budget))
    trace: list[tuple[Tensor, Tensor]] = []
    for layer in options:
        cheapest_rest -= min(c for c, _ in layer)
        costs = torch.tensor([c for c, _ in layer], dtype=torch.float64)
        values = torch.tensor([v for _, v in layer], dtype=torch.float64)
        new_cost = (cost[:, None] + costs).flatten()
        new_value = (value[:, None] + values).flatten()
        # by cost, the more valuable first among equals: sort by the second key, then stably by the first
        order = new_value.argsort(descending=True, stable=True)
        order = order[new_cost[order].argsort(stable=True)]
        order = order[new_cost[order] + cheapest_rest <= budget + slack]
        if not len(order):
            return order.double(), order.double(), trace
        best_before = torch.cat([torch.full((1,), -torch.inf, dtype=torch.float64), new_value[order].cummax(0).values])
        order = order[new_value[order] > best_before[:-1]]
        if len(order) > states:
            order = order[_thin(new_cost[order], states)]
        trace.append((order // len(layer), order % len(layer)))
        cost, value = new_cost[order], new_value[order]
    return cost, value, trace


def _thin(cost: Tensor, states: int) -> Tensor:
    """Keep the last (most valuable) state of each cost interval, and the cheapest of all."""
    interval = ((cost - cost[0]) / (cost[-1] - cost[0]) * (states - 1)).long()
    keep = torch.ones(len(cost), dtype=torch.bool)
    keep[:-1] = interval[1:] != interval[:-1]
    keep[0] = True
    return keep


def _choices(trace: list[tuple[Tensor, Tensor]], state: int) -> list[int]:
    chosen: list[int] = []
    for parent, option in reversed(trace):
        chosen.append(int(option[state]))
        state = int(parent[state])
    return chosen[::-1]
