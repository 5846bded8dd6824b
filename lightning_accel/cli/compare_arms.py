"""The arms of ``lightning-accel compare``: one composed configuration, with and without the accelerators."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from lightning_accel import __version__
from lightning_accel.cli.compose import UsageError
from lightning_accel.cli.errors import parameters
from lightning_accel.evidence.runs import Fit
from lightning_accel.evidence.workers import Arm
from lightning_accel.measure import environment

PLAIN, ACCELERATED, PLAIN_AGAIN = "plain", "accelerated", "plain again"
_PEERS = ("freeze_bottom_half", "torch_compile")
# What may differ between rows that belong together.
_FREE = ("paths", "compare", "hydra", "optimized_metric", "optimized_mode", "monitoring", "logger")


class FreezeBottomHalf(Callback):
    """Freeze the first modules that hold half of the parameters: the cheapest way to make a step faster."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Freeze once all parameters are in the optimizer; those without a gradient are skipped by it."""
        parameters = list(pl_module.parameters())
        left = sum(p.numel() for p in parameters) // 2
        for parameter in parameters:
            left -= parameter.numel()
            if left < 0:
                break
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class ConfiguredFit:
    """Builds the fit of one arm in its own process; see `lightning_accel.evidence.runs.MakeFit`.

    Attributes:
        config: The composed configuration, resolved, as plain data.
        accelerators: Whether the callbacks and the strategy of the configuration take part.
        peer: Name of what takes part in their place.
    """

    config: dict[str, Any]
    accelerators: bool
    peer: str | None = None

    def __call__(self, seed: int, folder: Path) -> Fit:
        """Build trainer, module and data under ``seed``."""
        from lightning_accel.cli.fit import build

        cfg = OmegaConf.create(self.config)
        cfg.seed = seed
        if cfg.compare.cold:
            _empty_caches(cfg, folder)
        if not self.accelerators:
            cfg.trainer.strategy = "auto"
        run = build(cfg, accelerators=self.accelerators, monitoring=False, loggers=False, root_dir=folder)
        model = run.model
        if self.peer == "freeze_bottom_half":
            run.trainer.callbacks.append(FreezeBottomHalf())  # type: ignore[attr-defined]
        if self.peer == "torch_compile":
            compiled: Callable[..., Any] = torch.compile(model)
            model = compiled  # type: ignore[assignment]
        return run.trainer, model, run.data


def _empty_caches(cfg: DictConfig, folder: Path) -> None:
    """Give this run caches of its own, so that it pays for all that it sets up."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    for node in (cfg.get("callbacks") or {}).values():
        if "cache_dir" in parameters(node._target_) and node.get("cache_dir") is None:
            node.cache_dir = str(folder / "cache")


def arms(cfg: DictConfig) -> list[Arm]:
    """Return the arms that ``cfg.compare`` asks for, the plain one first.

    Raises:
        UsageError: If there is nothing to compare, or a baseline is unknown.
    """
    settings = cfg.compare
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    plain = ConfiguredFit(config, accelerators=False)
    if settings.aa:
        return [Arm(PLAIN, plain, settings.threads), Arm(PLAIN_AGAIN, plain, settings.threads)]
    if not cfg.get("callbacks") and cfg.trainer.get("strategy", "auto") == "auto":
        raise UsageError(
            "there is nothing to compare: choose accelerators (callbacks=[rank_quantization]), a strategy, or compare "
            "the plain run with itself (compare --aa)."
        )
    unknown = [name for name in settings.baselines if name not in _PEERS]
    if unknown:
        raise UsageError(f"`compare.baselines` must be among {', '.join(_PEERS)}, got {unknown[0]}.")
    peers = [
        Arm(
            name.replace("_", " "),
            ConfiguredFit(config, accelerators=False, peer=name),
            settings.threads,
            # Counting operations makes a compiled module leave its compiled code.
            count_flops=name != "torch_compile",
        )
        for name in dict.fromkeys(settings.baselines)
    ]
    accelerated = Arm(ACCELERATED, ConfiguredFit(config, accelerators=True), settings.threads)
    return [Arm(PLAIN, plain, settings.threads), accelerated, *peers]


def fingerprint(cfg: DictConfig) -> str:
    """Return a short digest of everything that makes rows comparable: settings, versions, processor, threads."""
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    kept = {name: value for name, value in config.items() if name not in _FREE}
    kept["trainer"] = {k: v for k, v in config["trainer"].items() if k != "default_root_dir"}
    kept["arms"] = [cfg.compare.aa, cfg.compare.cold, sorted(cfg.compare.baselines), cfg.compare.threads]
    kept["where"] = [__version__, {k: v for k, v in environment().items() if k != "threads"}]
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
