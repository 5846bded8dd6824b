"""Training steps of whole LightningModules through a Trainer, without and with `IntraStreamScheduling`.

The modules know nothing of it. The first steps of a fit, which it watches and measures in, are left out of the times.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from lightning_accel.bench.recurrent.cases import peak_kib
from lightning_accel.callbacks.recurrent.intra_stream_scheduling import IntraStreamScheduling
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired
from lightning_accel.zoo.models.char_lm import CharLM

INPUT, HIDDEN, CLASSES = 128, 256, 97
_SETTLED = 3  # steps of a fit until every schedule is compared and chosen
_MEMORY_BATCH = 32
_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1000,  # so that a schedule may take its time to be made; the clock ends the fit after one
    "devices": 1,
}

Batches = list[tuple[Tensor, Tensor]]


class PackedTagger(LightningModule):
    """Tag every step of sequences of unequal length, as a reader would write it: pack, ``nn.LSTM``, unpack.

    A batch is x (T, B, 128) and the lengths (B,).
    """

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(INPUT, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy of tags that follow from the input."""
        x, lengths = batch
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.rnn(packed)[0])
        logits = self.head(hidden)
        tags = x[: len(logits), :, :CLASSES].argmax(-1)
        inside = torch.arange(len(logits))[:, None] < lengths
        return cross_entropy(logits[inside], tags[inside])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(*, quick: bool, device: str) -> Iterator[BenchRow]:
    """Yield the rows; ``quick`` takes shorter sequences and fewer fits, and leaves out memory."""
    if device == "cpu":  # torch's packed kernel is slow there only
        steps = 128 if quick else 512
        yield _row(
            f"fit, packed nn.LSTM, H={HIDDEN}, T={steps}, B=16",
            PackedTagger,
            packed_batches(steps, 16, _SETTLED + 2),
            fits=2 if quick else 4,
            device=device,
            target=None if quick else 5.0,
        )
    for batch in (1,) if quick else (1, 4, 8):
        yield _row(
            f"fit, character model, LayerNorm LSTM, H={HIDDEN}, T=128, B={batch}",
            _char_lm,
            token_batches(128, batch, _SETTLED + 6),
            fits=2 if quick else 4,
            device=device,
        )
    if device == "cpu" and not quick:
        yield from _memory_rows()


def _char_lm() -> CharLM:
    return CharLM(cell="layer_norm", vocab_size=CLASSES, embedding_dim=INPUT, hidden_size=HIDDEN)


def packed_batches(steps: int, streams: int, count: int) -> Batches:
    """Return batches of sequences of ``steps / 2`` to ``steps`` steps."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        lengths = torch.randint(steps // 2, steps + 1, (streams,), generator=generator)
        lengths[0] = steps
        batches.append((torch.randn(steps, streams, INPUT, generator=generator), lengths))
    return batches


def token_batches(steps: int, streams: int, count: int) -> Batches:
    """Return batches of random tokens and of those that follow them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, CLASSES, (count, streams, steps + 1), generator=generator)
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


class _StepClock(Callback):
    """Notes the seconds of every step, data and hooks of other callbacks included, and its loss."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._begin = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:  # noqa: ARG002
        self.losses.append(float(outputs["loss"]))
        now = time.perf_counter()
        self.seconds.append(now - self._begin)
        self._begin = now


def fit(make: Callable[[], LightningModule], batches: Batches, device: str, *callbacks: Callback) -> _StepClock:
    """Train a new module on the batches and return the times of its steps."""
    seed_everything(0, verbose=False)
    clock = _StepClock()
    # the clock stands last: a step ends when every callback is through with it
    trainer = Trainer(accelerator=device, callbacks=[*callbacks, clock], **_QUIET)
    trainer.fit(make(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]  # a list is a dataset
    return clock


def _row(
    case: str,
    make: Callable[[], LightningModule],
    batches: Batches,
    *,
    fits: int,
    device: str,
    target: float | None = None,
) -> BenchRow:
    plain: list[float] = []
    scheduled: list[float] = []
    error = 0.0
    for k in range(fits):
        clocks = {}
        for arm in ("plain", "scheduled") if k % 2 else ("scheduled", "plain"):
            clocks[arm] = fit(make, batches, device, *([IntraStreamScheduling()] if arm == "scheduled" else []))
        plain.append(median(clocks["plain"].seconds[_SETTLED:]))
        scheduled.append(median(clocks["scheduled"].seconds[_SETTLED:]))
        pairs = zip(clocks["plain"].losses, clocks["scheduled"].losses, strict=True)
        error = max(error, *(abs(a - b) / abs(a) for a, b in pairs))
    return BenchRow(
        suite="recurrent",
        case=case,
        variant="IntraStreamScheduling",
        baseline="plain Trainer",
        ratio=compare_paired(plain, scheduled),
        seconds={"plain Trainer": median(plain), "IntraStreamScheduling": median(scheduled)},
        target=target,
        note=f"whole steps of a Trainer, optimizer included; losses equal to {error:.0e}",
    )


_MEMORY_CASES: dict[str, tuple[Callable[[], LightningModule], Callable[[int, int], Batches]]] = {
    "packed nn.LSTM": (PackedTagger, lambda steps, count: packed_batches(steps, _MEMORY_BATCH, count)),
    "character model, LayerNorm LSTM": (_char_lm, lambda steps, count: token_batches(steps, _MEMORY_BATCH, count)),
}


def _memory_rows() -> Iterator[BenchRow]:
    for name in _MEMORY_CASES:
        peaks = {arm: _peak_memory(name, arm) for arm in ("plain", "scheduled")}
        yield BenchRow(
            suite="recurrent",
            case=f"peak memory of a fit, {name}, H={HIDDEN}, T=128, B={_MEMORY_BATCH}",
            variant="IntraStreamScheduling",
            baseline="plain Trainer",
            ratio=compare_paired([float(peaks["scheduled"])], [float(peaks["plain"])]),
            target=1.1,
            better="at most",
            note=f"growth by the last five of eight steps, {peaks['scheduled']} over {peaks['plain']} KiB; no times",
        )


def _peak_memory(name: str, arm: str) -> int:
    """Return the KiB by which a process of its own grows in five training steps."""
    code = f"from lightning_accel.bench.recurrent.trainer_rows import print_peak; print_peak({name!r}, {arm!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout.split()[-1])


class _Growth(Callback):
    """Measures how far the process grows after the first steps, in which libraries load and schedules are made."""

    def __init__(self, settled: int) -> None:
        self.settled, self.before = settled, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ARG002
        if trainer.global_step == self.settled:
            self.before = peak_kib()


def print_peak(name: str, arm: str) -> None:
    """Print the growth of this process in five steps of a fit, in KiB; called in a process of its own."""
    torch.set_num_threads(1)
    make, batches = _MEMORY_CASES[name]
    few = batches(8, _SETTLED + 1)
    growth = _Growth(len(few))
    fit(make, few + batches(128, 5), "cpu", *([IntraStreamScheduling()] if arm == "scheduled" else []), growth)
    print(max(1, peak_kib() - growth.before))
