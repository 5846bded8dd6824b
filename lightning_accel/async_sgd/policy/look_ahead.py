"""The default staleness rule: workers compute on the parameters as they will be when their gradients arrive.

Several workers that push one after another make every gradient some steps old. Under momentum that is what harms most:
a delay turns the damping of the heavy ball into driving force. So the server publishes a forecast of its parameters,
makes momentum last as many times longer as gradients come late, which is what makes a forecast good, and bounds
gradients that grow, which is how an oscillation begins. Where momentum is not its to change, it lowers the rate
instead. The method card derives the numbers below. Without staleness nothing of this acts, not in one bit.
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

REACH = 2.0  # steps that the forecast looks ahead, in units of the mean staleness, with momentum that lasts longer
SHORT_REACH = 1.3  # the same with momentum as it is
RATE_EXPONENT = 0.75  # where momentum is as it is, the rate falls with this power of 1 + mean staleness
NORMALISED_RATE_EXPONENT = 0.25  # the same for Adam and its like, whose steps are as long as the rate says
NORM_BOUND = 1.5  # longest gradient, in units of the running mean of their norms
_SHARE = 0.05  # of the newest staleness in the running mean
_NORM_SHARE = 0.03  # the same for norms


class LookAhead:
    """Forecast the parameters of a server, and say how much each stale push counts.

    Each optimizer has a staleness of its own, in steps of its own, with ``s`` its running mean. A gradient is at most
    ``NORM_BOUND`` times as long as the running mean of their norms. What is published is ``x + reach * s * (x -
    x_before)`` where ``x_before`` is ``x`` before the optimizer's last step (without momentum: ``x``). ``SGD`` steps
    with the momentum ``m ** (1 / (1 + s))`` in the place of ``m``, and with the rate at which each gradient still moves
    the parameters as far in the end. Others step with the rate times ``(1 + s) ** -RATE_EXPONENT`` (or
    ``NORMALISED_RATE_EXPONENT``).

    Args:
        parameters: Of the server, all of them.
        pieces: For each optimizer, tensors that share memory with its parameters and cover them.
        optimizers: Over them.

    References:
        Forecast by momentum: Hakimi, Barkai, Gabel, Schuster, arXiv:1907.11612. *Deviations*: one momentum for all
        workers, kept by the user's own optimizer, which lasts as long as theirs do (``m`` a step of each worker); the
        forecast goes on with the last step as it was and reaches twice the staleness, which damps most on a quadratic.
        Asynchrony as momentum: Mitliagkas, Zhang, Hadjis, Re, arXiv:1605.09774.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], pieces: Sequence[Sequence[Tensor]], optimizers: Sequence[Optimizer]
    ) -> None:
        self._parameters = [p.detach() for p in parameters]
        self._pieces = [[piece.detach() for piece in of_optimizer] for of_optimizer in pieces]
        self._optimizers = optimizers
        count = len(optimizers)
        self._staleness = [0.0] * count
        self._norms = [0.0] * count
        self._pushes = [0] * count
        self._recent: deque[int] = deque(maxlen=4096)  # optimizers of the last steps, newest last
        self._before: list[list[Tensor]] = [[] for _ in range(count)]
        self._offsets: list[list[Tensor]] = [[] for _ in range(count)]  # forecast minus parameters
        self._views: dict[tuple[int, ...], list[Tensor]] = {}
        self._forecasts = True
        self.reach = 0.0  # of the last step: how many steps its forecast looks ahead

    def observe(self, optimizer: int, staleness: int, gradients: Sequence[Tensor | None]) -> tuple[float, float]:
        """Take note of a push; returns the factor on its learning rate and the one on its gradients.

        Args:
            optimizer: Number of the optimizer that is to step.
            staleness: Steps of all optimizers since the parameters of the gradient were read.
            gradients: One entry a parameter, or None.
        """
        own = sum(which == optimizer for which in islice(reversed(self._recent), staleness))
        self._recent.append(optimizer)
        self._pushes[optimizer] += 1
        share = max(1.0 / self._pushes[optimizer], _SHARE)
        self._staleness[optimizer] += share * (own - self._staleness[optimizer])
        if not self._staleness[optimizer]:
            return 1.0, 1.0
        weight = 1.0
        if not self._lengthens(optimizer):
            exponent = NORMALISED_RATE_EXPONENT if is_normalised(self._optimizers[optimizer]) else RATE_EXPONENT
            weight = (1.0 + self._staleness[optimizer]) ** -exponent
        return weight, self._bound(optimizer, [g for g in gradients if g is not None])

    def mean_staleness(self, optimizer: int) -> float:
        """Return the running mean of an optimizer's staleness, in steps of its own."""
        return self._staleness[optimizer]

    def told(self, optimizer: int, staleness: float) -> None:
        """Take the mean staleness of an optimizer from somebody else, who observes its pushes."""
        self._staleness[optimizer] = staleness

    def _bound(self, optimizer: int, gradients: list[Tensor]) -> float:
        wide = [g.float() if g.dtype == torch.float16 else g for g in gradients]  # whose norm may overflow
        norm = float(torch.stack([n.double() for n in torch._foreach_norm(wide)]).norm()) if wide else 0.0
        mean = self._norms[optimizer]
        if not math.isfinite(norm):
            return 0.0
        if not mean:
            self._norms[optimizer] = norm
            return 1.0
        factor = min(1.0, NORM_BOUND * mean / norm) if norm else 1.0
        self._norms[optimizer] = (1.0 - _NORM_SHARE) * mean + _NORM_SHARE * norm * factor
        return factor

    def _lengthens(self, optimizer: int) -> bool:
        """Whether momentum is made to last longer: where every step goes on with the last ones as ``SGD`` does it."""
        ours = isinstance(self._optimizers[optimizer], torch.optim.SGD)
        return ours and self._forecasts and has_momentum(self._optimizers[optimizer])

    def _reach(self, optimizer: int) -> float:
        """Return how many steps of an optimizer the forecast looks ahead."""
        if not self._forecasts or not has_momentum(self._optimizers[optimizer]):
            return 0.0
        return (REACH if self._lengthens(optimizer) else SHORT_REACH) * self._staleness[optimizer]

    @contextlib.contextmanager
    def stepping(self, optimizer: int) -> Iterator[None]:
        """Let an optimizer step within, with the hyper-parameters that this rule gives it; then forecast anew."""
        self._begin_step(optimizer)
        with _momentum_lasts(self._optimizers[optimizer], self._lasts(optimizer)):
            yield
        self._end_step(optimizer)

    def _lasts(self, optimizer: int) -> float:
        return 1.0 + self._staleness[optimizer] if self._lengthens(optimizer) else 1.0

    @torch.no_grad()
    def _begin_step(self, optimizer: int) -> None:
        if not self._reach(optimizer):
            return
        pieces = self._pieces[optimizer]
        if not self._before[optimizer]:
            self._before[optimizer] = [torch.empty_like(piece) for piece in pieces]
            self._offsets[optimizer] = [torch.zeros_like(piece) for piece in pieces]
        torch._foreach_copy_(self._before[optimizer], pieces)

    @torch.no_grad()
    def _end_step(self, optimizer: int) -> None:
        self.reach = self._reach(optimizer)
        if self.reach and self._before[optimizer]:
            # three roundings, so that a replay with other tensors makes the same bits
            torch._foreach_copy_(self._offsets[optimizer], self._pieces[optimizer])
            torch._foreach_sub_(self._offsets[optimizer], self._before[optimizer])
            torch._foreach_mul_(self._offsets[optimizer], self.reach)

    @torch.no_grad()
    def published(self) -> list[Tensor]:
        """Return what workers are to compute on: the forecast, or the parameters themselves where there is none."""
        active = tuple(i for i, offsets in enumerate(self._offsets) if offsets)
        for i in active:
            torch._foreach_copy_(self._before[i], self._pieces[i])
            torch._foreach_add_(self._before[i], self._offsets[i])
        if active not in self._views:
            self._views[active] = self._with_forecasts(active)
        return self._views[active]

    def _with_forecasts(self, active: Sequence[int]) -> list[Tensor]:
        """Return the parameters, those that have a forecast replaced by the memory in which it is made."""
        forecasts: list[tuple[Tensor, Tensor]] = []
        for i in active:
            forecasts += zip(self._pieces[i], self._before[i], strict=True)
        found = []
        for parameter in self._parameters:
            value = parameter
            for piece, forecast in forecasts:
                first = (parameter.data_ptr() - piece.data_ptr()) // piece.element_size()
                if parameter.numel() and 0 <= first < piece.numel() and parameter.dtype == piece.dtype:
                    value = forecast.as_strided(parameter.shape, parameter.stride(), first)
            found.append(value)
        return found

    def settle(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return parameter values that a worker made of a forecast as values for the parameters themselves.

        What it left as it was stays as it is here. After that there are no more forecasts: who changes parameters
        between steps (projections, masks) wants them to be what they were made.
        """
        settled = list(values)
        if any(self._offsets):
            triples = zip(values, self._parameters, self.published(), strict=True)
            settled = [v if v is None else torch.where(v == ahead, p, v) for v, p, ahead in triples]
        self._forecasts = False
        self._offsets = [[] for _ in self._optimizers]
        self._before = [[] for _ in self._optimizers]
        self._views = {}
        return settled


@contextlib.contextmanager
def _momentum_lasts(optimizer: Optimizer, times: float) -> Iterator[None]:
    """Let momentum last so many times longer, with the rate at which each gradient moves as far as before in the end.

    What is under way when the number changes comes nearly as far, too: a velocity ``v`` goes ``rate * m / (1 - m)``
    times itself.
    """
    before: list[tuple[dict[str, Any], Any, float]] = []
    for group in optimizer.param_groups if times != 1.0 else []:
        momentum = group["momentum"]
        before.append((group, group["lr"], momentum))
        longer, rate = momentum, times**-RATE_EXPONENT
        if 0.0 < momentum < 1.0:
            longer = momentum ** (1.0 / times)
            rate = (1.0 - longer) / (1.0 - momentum)
        group.update(momentum=longer, lr=group["lr"] * rate)
    try:
        yield
    finally:
        for group, rate, momentum in before:
            group.update(momentum=momentum, lr=rate)


def has_momentum(optimizer: Optimizer) -> bool:
    """Whether steps go on in the direction of the last ones, so that they can be forecast."""
    groups = optimizer.param_groups
    return any(g.get("momentum", 0.0) or (g.get("betas") or (0.0,))[0] for g in groups)


def is_normalised(optimizer: Optimizer) -> bool:
    """Whether the length of a step is set by the rate, and not by the gradient (Adam and its like)."""
    normalising = (torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Rprop)
    return isinstance(optimizer, normalising) or any("betas" in group for group in optimizer.param_groups)
