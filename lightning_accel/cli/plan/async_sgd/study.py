"""Rules of asynchronous training against each other, simulated: a small network, any number of workers."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lightning_accel.async_sgd import Settings
from lightning_accel.async_sgd.simulation.advice import throughput
from lightning_accel.async_sgd.simulation.costs import Costs, Speeds, draw_slowness
from lightning_accel.async_sgd.simulation.lock_step import simulate_lock_step
from lightning_accel.async_sgd.simulation.run import SimulatedRun, simulate
from lightning_accel.async_sgd.simulation.training import Nothing, Training
from lightning_accel.zoo.data.digits import Digits

BATCH = 32
_HIDDEN = 32
_LOOKS = 64  # times that the test set is classified in a run
_WITHIN = 0.01  # of the accuracy of one process: what counts as having learnt
_LOCAL = 16

LOCK_STEP = "DDP"
RULES: dict[str, Settings] = {
    "look_ahead": Settings(),
    "inverse": Settings(staleness="inverse"),
    "staleness=none": Settings(staleness="none"),
    "delay_compensation": Settings(staleness="delay_compensation"),
    "drop beyond 16": Settings(staleness="drop"),
    "inverse, max_staleness=1": Settings(staleness="inverse", max_staleness=1),
    f"local_steps={_LOCAL}": Settings(local_steps=_LOCAL),
    f"local_steps={_LOCAL}, Nesterov": Settings(local_steps=_LOCAL, outer="delayed_nesterov"),
    f"local_steps={_LOCAL}, rounds": Settings(
        local_steps=_LOCAL, min_workers=1, round_grace=0.0, outer="nesterov", outer_momentum=0.5
    ),
}
"""What is compared, beside lock-step; rounds are of three quarters of the workers, see `settings_of`."""

_QUORUM = 0.75  # of the workers


@dataclass(frozen=True)
class Workers:
    """The workers of a study.

    Attributes:
        speeds: Their distribution, see `draw_slowness`.
        slowdown: Of the same.
        jitter: Each step takes ``1 - jitter`` to ``1 + jitter`` of its time.
    """

    speeds: Speeds
    slowdown: float
    jitter: float

    def slowness(self, count: int) -> list[float]:
        """Return how many times slower each of ``count`` workers is."""
        return draw_slowness(self.speeds, count, self.slowdown)


@dataclass(frozen=True)
class Cell:
    """What one rule makes with one number of workers.

    Attributes:
        rule: A name in `RULES`, or `LOCK_STEP`.
        workers: How many.
        run: Its times.
        accuracy: On the test set at the end; None if nothing was trained.
        seconds: Until the accuracy was within a point of that of one process; infinite if never, None as above.
    """

    rule: str
    workers: int
    run: SimulatedRun
    accuracy: float | None = None
    seconds: float | None = None


def costs_for(rule: str, costs: Costs) -> Costs:
    """Return the costs of a run by this rule: delay compensation also sends the parameters that it began with."""
    return (
        replace(costs, push_bytes=2 * costs.push_bytes, push=2 * costs.push) if rule == "delay_compensation" else costs
    )


def settings_of(rule: str, count: int) -> Settings:
    """Return the settings of a rule for ``count`` workers."""
    settings = RULES[rule]
    return replace(settings, min_workers=max(1, round(_QUORUM * count))) if settings.min_workers else settings


def times(costs: Costs, workers: Workers, counts: Sequence[int]) -> Iterator[Cell]:
    """Yield the throughput of each rule for each number of workers, without training."""
    for count in counts:
        slowness = workers.slowness(count)
        known: dict[Any, SimulatedRun] = {}
        for rule in RULES:
            takes, settings = costs_for(rule, costs), settings_of(rule, count)
            drops, rounds = settings.staleness == "drop", settings.min_workers
            key = takes, settings.max_staleness, settings.local_steps, drops, rounds
            if key not in known:  # other rules differ in what a push is worth, not in time
                known[key] = throughput(takes, slowness, settings, jitter=workers.jitter)
            yield Cell(rule, count, known[key])
        steps = [costs.step * slow for slow in slowness]
        found = simulate_lock_step(Nothing(count * 40), step_seconds=steps, costs=costs, jitter=workers.jitter)
        yield Cell(LOCK_STEP, count, found)


class Study:
    """Trains the same small network with each rule: 64 inputs, 32 hidden units, the digits of scikit-learn.

    Args:
        costs: Of a step and all around it, of the user's own model.
        workers: That are simulated.
        batches: Of 32 digits that each run is given, >= 1.
        normalised: Whether to step by AdamW, rate 0.002; else by SGD, rate 0.05 and momentum 0.9.
        seed: Of all that is random.

    Attributes:
        batches: What each run is given.
        alone: What one process makes.
    """

    def __init__(self, costs: Costs, workers: Workers, *, batches: int, normalised: bool, seed: int = 0) -> None:
        self._costs, self._workers, self._normalised, self._seed = costs, workers, normalised, seed
        data = Digits(batch_size=BATCH, seed=seed)
        data.prepare_data()
        data.setup("fit")
        (x, y), (self._test_x, self._test_y) = data.parts[0].tensors, data.parts[2].tensors
        generator = torch.Generator().manual_seed(seed)
        order: list[Tensor] = []
        while len(order) < batches:
            order += [rows for rows in torch.randperm(len(x), generator=generator).split(BATCH) if len(rows) == BATCH]
        self.batches = [(x[rows].flatten(1), y[rows]) for rows in order[:batches]]
        self.alone = self.cell(LOCK_STEP, 1)

    def cell(self, rule: str, count: int) -> Cell:
        """Train with ``count`` workers by a rule."""
        torch.manual_seed(self._seed)
        module = nn.Sequential(nn.Linear(64, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 10))
        watch = _Watch(self._accuracy, len(self.batches) // _LOOKS)
        costs = costs_for(rule, self._costs)
        steps = [costs.step * slow for slow in self._workers.slowness(count)]
        values: dict[str, Any] = {
            "step_seconds": steps, "costs": costs, "jitter": self._workers.jitter, "seed": self._seed, "observe": watch
        }  # fmt: skip
        optimizer = self._optimizer(module)
        if rule == LOCK_STEP:
            run = simulate_lock_step(Training(module, _loss, self.batches, optimizer), **values)
        else:
            run = simulate(module, _loss, self.batches, optimizer, settings=settings_of(rule, count), **values)
        accuracy = self._accuracy(list(module.parameters()))
        goal = (accuracy if count == 1 else self.alone.accuracy or 0.0) - _WITHIN
        seconds = next((when for when, found in watch.found if found >= goal), math.inf)
        return Cell(rule, count, run, accuracy, seconds)

    def _optimizer(self, module: nn.Module) -> Optimizer:
        if self._normalised:
            return torch.optim.AdamW(module.parameters(), lr=2e-3)
        return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)

    @torch.no_grad()
    def _accuracy(self, values: Sequence[Tensor]) -> float:
        weight, bias, last_weight, last_bias = values
        hidden = functional.linear(self._test_x.flatten(1), weight, bias).relu()
        right = functional.linear(hidden, last_weight, last_bias).argmax(1) == self._test_y
        return right.double().mean().item()


class _Watch:
    """Notes the accuracy every so many batches."""

    def __init__(self, accuracy: Callable[[Sequence[Tensor]], float], every: int) -> None:
        self._accuracy, self._every, self._next = accuracy, max(1, every), 0
        self.found: list[tuple[float, float]] = []

    def __call__(self, seconds: float, batches: int, values: Sequence[Tensor]) -> None:
        if batches >= self._next:
            self._next = batches + self._every
            self.found.append((seconds, self._accuracy(values)))


def _loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])
