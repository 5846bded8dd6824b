"""What every variant of the asynchronous benchmark trains, and what it is judged by."""

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_accel.zoo.data.digits import Digits
from lightning_accel.zoo.models.cnn import CNN

BATCH = 64
ACCURACY = 0.97
_PASSES = 50
_LAST = 5  # snapshots, ten a second


@dataclass(frozen=True)
class Outcome:
    """What one variant did in its window.

    Attributes:
        seconds_per_sample: Wall time by samples of all workers.
        seconds_to_accuracy: Until the parameters classified 97 % of the held-out digits; infinite if never.
        accuracy: Mean over the parameters of the last half second.
    """

    seconds_per_sample: float
    seconds_to_accuracy: float
    accuracy: float


class Task:
    """The digits and a CNN that learns them; what every variant trains."""

    def __init__(self, device: str) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.device = device
        data = Digits(batch_size=BATCH)
        data.prepare_data()
        data.setup("fit")
        self.x, self.y = (torch.cat(t).to(device) for t in zip(*data.train_dataloader(), strict=True))
        held_out = [*data.val_dataloader(), *data.test_dataloader()]  # nothing is chosen by either
        self.held_x, self.held_y = (torch.cat(t).to(device) for t in zip(*held_out, strict=True))
        self.net = CNN().to(device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.02, momentum=0.9)
        self.snapshots: list[tuple[float, list[Tensor]]] = []
        for _ in range(3):  # the first steps are slower than all others
            self.loss(torch.arange(BATCH)).backward()
        self.optimizer.zero_grad()

    def seconds_a_step(self) -> float:
        """Measure a training step, the optimizer's included; changes the parameters."""
        seconds = []
        for unit in self.units(0)[:21]:
            began = time.perf_counter()
            self.optimizer.zero_grad()
            self.loss(torch.tensor(unit)).backward()
            self.optimizer.step()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def loss(self, rows: Tensor, net: nn.Module | None = None) -> Tensor:
        """Return the mean cross entropy of some rows."""
        output: Tensor = (self.net if net is None else net)(self.x[rows])
        return functional.cross_entropy(output, self.y[rows])

    def units(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch: several passes over the digits, which alone are 22 batches."""
        batches = []
        for passing in range(_PASSES):
            generator = torch.Generator().manual_seed(_PASSES * epoch + passing)
            order = torch.randperm(len(self.x), generator=generator).tolist()
            batches += [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
        return batches

    def note(self, seconds: float) -> None:
        """Keep a copy of the parameters ten times a second, to be judged after the window."""
        if not self.snapshots or seconds - self.snapshots[-1][0] >= 0.1:
            self.snapshots.append((seconds, [t.detach().clone() for t in self.net.state_dict().values()]))

    def outcome(self, samples_per_second: float) -> Outcome:
        """Return what the run came to: throughput and accuracy over time."""
        self.note(math.inf)
        self.net.eval()
        judged = []
        for when, state in self.snapshots:
            self.net.load_state_dict(dict(zip(self.net.state_dict(), state, strict=True)))
            with torch.no_grad():
                right = self.net(self.held_x).argmax(1) == self.held_y
            judged.append((when, right.double().mean().item()))
        reached = next((when for when, accuracy in judged if accuracy >= ACCURACY), math.inf)
        last = [accuracy for _, accuracy in judged[-_LAST:]]
        return Outcome(1.0 / samples_per_second, reached, statistics.fmean(last))
