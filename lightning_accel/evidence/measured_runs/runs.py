"""One measured run of ``fit``: what is recorded, and how."""

import contextlib
import dataclasses
import gc
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything

from lightning_accel.evidence.measured_runs.energy import EnergyMeter
from lightning_accel.evidence.measured_runs.step_clock import PHASES, StepClock
from lightning_accel.lightning_private.decision_line import CHANNELS

Fit: TypeAlias = tuple[Trainer, LightningModule, LightningDataModule | None]
MakeFit: TypeAlias = Callable[[int, Path], Fit]
"""Builds trainer, module and data from a seed and an empty folder for whatever the run writes."""

_UNSETTLED = 0.1  # share of the steps, at the start, that does not count as steady state


@dataclass(frozen=True)
class Run:
    """One run of one arm.

    Attributes:
        arm: Name of the arm.
        pair: Runs of one number were taken side by side; -1 for the discarded warm-up.
        seed: Of this run; the same for all arms of a pair.
        order: Place within the pair, from 0.
        fit_seconds: Wall seconds of ``trainer.fit``, with everything a callback does to set itself up.
        cpu_seconds: Of this process and its children, over the same span.
        setup_seconds: Wall seconds before the first training step; ``None`` if no step was seen.
        callback_seconds: Wall seconds within all training steps of the fit that callbacks took, probing included.
        validation_seconds: Wall seconds of all validations.
        loading_seconds: Wall seconds that steps waited for their batch.
        stages: Spans of training by what was trained, in the order in which they first came: ``parameters``, how many
            of them ``trained``, ``steps``, and their ``seconds`` without callbacks.
        steps: Optimizer steps.
        step_seconds: Median of a training step in steady state; ``None`` if no step was seen.
        phase_seconds: Medians of its phases, in steady state.
        samples_per_second: Samples through the training loop in steady state, loading included.
        parameters: Number of parameters after ``fit``.
        flops: Floating point operations of a training step late in the run; ``None`` if not counted.
        peak_memory_bytes: Peak resident memory of the arm's process, on CUDA peak allocated memory.
        checkpoint_bytes: Size of a full checkpoint after ``fit``.
        devices: Number of devices that were busy for ``fit_seconds``.
        energy_joules: Of processors and device over ``fit_seconds``; ``None`` where the machine does not tell.
        metrics: Last logged value of every metric.
        curve: Metrics against seconds since the start of ``fit``.
        messages: What the accelerators logged: what they did, or why they left the model alone.
        fingerprint: Of the settings that make runs comparable.
    """

    arm: str
    pair: int
    seed: int
    order: int
    fit_seconds: float
    cpu_seconds: float
    setup_seconds: float | None
    callback_seconds: float | None
    steps: int
    step_seconds: float | None
    phase_seconds: dict[str, float]
    samples_per_second: float | None
    parameters: int
    flops: float | None
    peak_memory_bytes: int
    checkpoint_bytes: int | None
    validation_seconds: float = 0.0
    loading_seconds: float = 0.0
    stages: list[dict[str, Any]] = field(default_factory=list)
    devices: int = 1
    energy_joules: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    fingerprint: str = ""

    @property
    def is_warmup(self) -> bool:
        """Whether the run only warmed up its worker."""
        return self.pair < 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Run":
        """Read back ``to_dict``.

        Raises:
            ValueError: If the fields are not those of a run.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if set(data) != names:
            wrong = ", ".join(sorted(set(data) ^ names))
            raise ValueError(f"a row has missing or unknown fields ({wrong}); it was written by another version.")
        return cls(**data)


def measure_fit(
    make: MakeFit, *, arm: str, pair: int, seed: int, order: int, folder: Path, count_flops: bool, fingerprint: str = ""
) -> Run:
    """Build one fit from ``seed``, run it under the clock and return what was measured.

    The clock runs over ``trainer.fit`` only; writing a checkpoint to weigh it comes after it. Counting operations
    costs a few slow steps.
    """
    gc.collect()
    if "torch._dynamo" in sys.modules:  # else compiled code of earlier runs piles up until torch gives up compiling
        torch.compiler.reset()
    seed_everything(seed, workers=True, verbose=False)
    trainer, module, data = make(seed, folder)
    clock = StepClock(count_flops=count_flops)
    clock.attach(trainer)
    device = trainer.strategy.root_device
    _forget_peak(device)
    _synchronize(device)
    cpu_before = _cpu_seconds()
    meter = EnergyMeter(device)
    clock.start()
    begin = time.perf_counter()
    with _Messages() as said:
        trainer.fit(module, datamodule=data)
    _synchronize(device)
    fit_seconds = time.perf_counter() - begin
    cpu_seconds = _cpu_seconds() - cpu_before
    energy = meter.joules()
    clock.end_epoch()
    metrics = {name: _finite(float(value)) for name, value in trainer.callback_metrics.items()}
    curve = [{**p, "metrics": {k: _finite(v) for k, v in p["metrics"].items()}} for p in clock.curve]
    if not curve and metrics:  # the training ran in other processes, where no clock was
        curve = [{"seconds": fit_seconds, "epoch": trainer.current_epoch, "step": trainer.global_step}]
        curve[0]["metrics"] = dict(metrics)
    return Run(
        arm=arm,
        pair=pair,
        seed=seed,
        order=order,
        fit_seconds=fit_seconds,
        cpu_seconds=cpu_seconds,
        setup_seconds=clock.setup_seconds,
        callback_seconds=sum(s["callbacks"] for s in clock.steps) if clock.steps else None,
        steps=trainer.global_step,
        step_seconds=_steady_median([sum(s.values()) for s in clock.steps]),
        phase_seconds={p: _steady_median([s[p] for s in clock.steps]) or 0.0 for p in PHASES if clock.steps},
        samples_per_second=_throughput(clock),
        parameters=sum(p.numel() for p in module.parameters()),
        flops=statistics.fmean(clock.flops) if clock.flops else None,
        peak_memory_bytes=_peak_bytes(device),
        checkpoint_bytes=_checkpoint_bytes(trainer, folder),
        validation_seconds=clock.validation_seconds,
        loading_seconds=sum(clock.waits),
        stages=_stages(clock),
        devices=max(1, trainer.num_devices * trainer.num_nodes),
        energy_joules=energy,
        metrics=metrics,
        curve=curve,
        messages=said.messages,
        fingerprint=fingerprint,
    )


class _Messages(logging.Handler):
    """Collects what this package logs, at INFO and above, while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []
        self._loggers = [logging.getLogger(name) for name in ("lightning_accel", *CHANNELS)]
        self._before: list[tuple[int, bool]] = []

    def __enter__(self) -> "_Messages":
        self._before = [(logger.level, logger.propagate) for logger in self._loggers]
        for logger in self._loggers:
            if logger.name in CHANNELS and not logger.isEnabledFor(logging.INFO):
                logger.propagate = False  # whoever silenced Lightning shall not see the lines because we want them
            logger.setLevel(logging.INFO)
            logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        for logger, (level, propagate) in zip(self._loggers, self._before, strict=True):
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of one record."""
        self.messages.append(record.getMessage())


def _stages(clock: StepClock) -> list[dict[str, Any]]:
    stages: dict[tuple[int, int], dict[str, Any]] = {}
    for (parameters, trained), step in zip(clock.stages, clock.steps, strict=True):
        blank = {"parameters": parameters, "trained": trained, "steps": 0, "seconds": 0.0}
        stage = stages.setdefault((parameters, trained), blank)
        stage["steps"] += 1
        stage["seconds"] += sum(step.values()) - step["callbacks"]
    return list(stages.values())


def _steady(values: list[Any]) -> list[Any]:
    return values[max(1, int(_UNSETTLED * len(values))) :] if len(values) > 2 else values


def _steady_median(values: list[float]) -> float | None:
    return statistics.median(_steady(values)) if values else None


def _throughput(clock: StepClock) -> float | None:
    samples = sum(_steady(clock.samples))
    seconds = sum(sum(s.values()) for s in _steady(clock.steps))
    if not samples or not seconds:
        return None
    waits = statistics.median(clock.waits) * len(_steady(clock.steps)) if clock.waits else 0.0
    return samples / (seconds + waits)


def _checkpoint_bytes(trainer: Trainer, folder: Path) -> int | None:
    path = folder / "weighed.ckpt"
    trainer.save_checkpoint(path)
    if path.is_dir():  # sharded
        return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    return path.stat().st_size if path.exists() else None


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # Linux: 5 resets the peak of the resident size
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        # `ru_maxrss` survives exec on Linux and would report the parent's memory; the kernel's own mark does not.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _finite(value: float) -> float | None:
    """JSON knows no NaN; a diverged metric is ``None``."""
    return value if math.isfinite(value) else None
