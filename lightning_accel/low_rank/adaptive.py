"""Adaptive freezing: a factor that hardly moves any more is frozen for good."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.arguments import check_integer, check_number
from lightning_accel.low_rank.freezing import factor_parameter_names, set_trainable


class AdaptiveFreezing:
    r"""Watch factors over windows of steps; settle those with ``||F_t - F_(t-w)|| / ||F_t|| < threshold``.

    Settled factors are frozen in at most ``max_events`` batches, so that a compiled model sees few patterns. With
    ``order``, every module before the first unsettled one is frozen as a whole (a *prefix*: biases and norms
    included), so that the backward pass ends there and the input gradient is dropped too. The order may be set later,
    before the first `observe`; it is part of the state.

    The object is plain data: deep-copyable, picklable, and exact from its `state_dict`.

    Args:
        threshold: Relative update norm over one window under which a factor is settled, > 0.
        window_steps: Optimizer steps of a window, >= 1.
        max_events: Most changes of the frozen set, >= 1; with the start that makes one pattern more.
        order: Names of the modules that own parameters in the order in which they run, to freeze prefixes (``""`` is
            the model itself); empty freezes none.

    Raises:
        TypeError: If a value is of another kind.
        ValueError: If a value is out of range.

    References:
        Hajimolahoseini, Ahmed, Liu, arXiv:2309.03824, freeze by turns; *Deviations*: this rule freezes for good, by the
        observed updates.

    Example:
        >>> from lightning_accel.low_rank import AdaptiveFreezing
        >>> freezing = AdaptiveFreezing(threshold=1e-3, window_steps=10)
        >>> sorted(freezing.frozen)
        []
    """

    def __init__(self, *, threshold: float, window_steps: int, max_events: int = 3, order: Sequence[str] = ()) -> None:
        check_number("threshold", threshold, above=0.0)
        check_integer("window_steps", window_steps, at_least=1)
        check_integer("max_events", max_events, at_least=1)
        self.threshold = threshold
        self.window_steps = window_steps
        self.max_events = max_events
        self.order = tuple(order)
        self.settled: set[str] = set()
        self.frozen: set[str] = set()
        self.events = 0
        self._steps = 0
        self._reference: dict[str, Tensor] = {}

    def observe(self, model: nn.Module) -> bool:
        """Take note of one optimizer step; return whether the frozen set changed (then call `apply`).

        Reads each watched parameter once a window, with one host synchronization a parameter.

        Raises:
            ValueError: If the model has no low-rank layer.
        """
        watched = self._watched(model)
        if not watched:
            raise ValueError("the model has no low-rank layer to freeze; decompose it first (`RankQuantization`).")
        if not self._reference:  # the first window begins here
            self._remember(watched)
            return False
        self._steps += 1
        if self._steps % self.window_steps:
            return False
        for name, parameter in watched.items():
            if name in self.settled or name not in self._reference:
                continue
            size = float(torch.linalg.vector_norm(parameter.detach().float()))
            moved = float(torch.linalg.vector_norm((parameter.detach() - self._reference[name]).float()))
            if moved < self.threshold * max(size, torch.finfo(torch.float32).tiny):
                self.settled.add(name)
        self._remember(watched)
        return self._release(model, watched)

    def apply(self, model: nn.Module, *, user_frozen: Collection[str] = ()) -> list[str]:
        """Freeze what was decided so far; return the full names of the frozen parameters.

        Args:
            model: Changed in place.
            user_frozen: Parameters that were frozen before and are none of our business.
        """
        parameters = dict(model.named_parameters())
        for name in self.frozen:
            if name not in user_frozen and name in parameters:
                set_trainable(parameters[name], False)
        return sorted(self.frozen)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `observe` depends on."""
        return {
            "settled": sorted(self.settled),
            "frozen": sorted(self.frozen),
            "events": self.events,
            "steps": self._steps,
            "order": list(self.order),
            "reference": {name: tensor.clone() for name, tensor in self._reference.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.settled, self.frozen = set(state["settled"]), set(state["frozen"])
        self.events, self._steps, self.order = state["events"], state["steps"], tuple(state["order"])
        self._reference = {name: tensor.clone() for name, tensor in state["reference"].items()}

    def _watched(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Factors of all low-rank layers, and all parameters of the modules in ``order``."""
        names = factor_parameter_names(model)
        if not names:
            return {}
        return {n: p for n, p in model.named_parameters() if n in names or _owner(n) in self.order}

    def _remember(self, watched: dict[str, nn.Parameter]) -> None:
        self._reference = {n: p.detach().clone() for n, p in watched.items() if n not in self.settled}

    def _release(self, model: nn.Module, watched: dict[str, nn.Parameter]) -> bool:
        """Freeze the settled ones once their factors make up the next share of all: 1 / max_events, 2 / max_events, ...

        When all factors rest, what events are left are for a prefix that grows.
        """
        factors = factor_parameter_names(model)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        ready = (self.settled & factors) | frozen_prefix(self.order, watched, self.settled)
        if trainable <= ready:  # a step needs something to train
            ready = self.settled & factors
        enough = len(ready & factors) * self.max_events >= len(factors) * (self.events + 1)
        if self.events >= self.max_events or not enough or trainable <= ready:
            return False
        if ready <= self.frozen:
            return False
        self.frozen |= ready
        self.events += 1
        return True


def frozen_prefix(order: Sequence[str], parameters: Collection[str], settled: Collection[str]) -> set[str]:
    """Return the parameters of the modules that run before the first one with a parameter that is not settled.

    Args:
        order: Module names in the order in which they run.
        parameters: Full names of the parameters that count.
        settled: Full names of those that are settled.
    """
    prefix: set[str] = set()
    for module in order:
        own = {name for name in parameters if _owner(name) == module}
        if not own <= set(settled):
            break
        prefix |= own
    return prefix


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
