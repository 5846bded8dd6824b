"""The arms of ``lightning-accel compare``: one composed configuration, with and without the accelerators."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_accel.cli.compare.peers import PEERS, free_alternatives, join, target_sparsity
from lightning_accel.cli.compose import compose
from lightning_accel.cli.errors import UsageError, parameters
from lightning_accel.evidence.measured_runs.runs import Fit, MakeFit
from lightning_accel.evidence.measured_runs.workers import Arm
from lightning_accel.measure import available_cores, environment

PLAIN, ACCELERATED, PLAIN_AGAIN = "plain", "accelerated", "plain again"
_WARMUP_EPOCHS = 2
# What may differ between rows that belong together.
_FREE = ("paths", "compare", "hydra", "optimized_metric", "optimized_mode", "monitoring", "logger")


@dataclass(frozen=True)
class ConfiguredFit:
    """Builds the fit of one arm in its own process; see `lightning_accel.evidence.measured_runs.runs.MakeFit`.

    Attributes:
        config: The composed configuration, resolved, as plain data.
        accelerators: Whether the callbacks and the strategy of the configuration take part.
        peer: Name of what takes part in their place.
        is_warmup: Whether two epochs are enough.
        seeded: Dotted keys that follow ``seed``, such as that of the data's split; see `following_seed`.
    """

    config: dict[str, Any]
    accelerators: bool
    peer: str | None = None
    is_warmup: bool = False
    seeded: tuple[str, ...] = ()

    def __call__(self, seed: int, folder: Path) -> Fit:
        """Build trainer, module and data under ``seed``."""
        from lightning_accel.cli.fit import build

        cfg = OmegaConf.create(self.config)
        cfg.seed = seed
        for key in self.seeded:
            OmegaConf.update(cfg, key, seed)
        if self.is_warmup:
            cfg.trainer.max_epochs = min(_WARMUP_EPOCHS, max(1, cfg.trainer.get("max_epochs") or _WARMUP_EPOCHS))
        if cfg.compare.cold:
            _empty_caches(cfg, folder)
        if not self.accelerators:
            cfg.trainer.strategy = "auto"
        run = build(cfg, accelerators=self.accelerators, monitoring=False, loggers=False, root_dir=folder)
        join(self.peer, run.trainer, run.model, target_sparsity(cfg))
        return run.trainer, run.model, run.data


def _empty_caches(cfg: DictConfig, folder: Path) -> None:
    """Give this run caches of its own, so that it pays for all that it sets up."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    for node in (cfg.get("callbacks") or {}).values():
        if "cache_dir" in parameters(node._target_) and node.get("cache_dir") is None:
            node.cache_dir = str(folder / "cache")


def arms(cfg: DictConfig) -> list[Arm]:
    """Return the arms that ``cfg.compare`` asks for, the plain one first.

    Raises:
        UsageError: If there is nothing to compare, a baseline is unknown, or the strategy starts processes of its own.
    """
    settings = cfg.compare
    strategy = cfg.trainer.get("strategy", "auto")
    if "async" in str(strategy.get("_target_", "") if OmegaConf.is_config(strategy) else strategy).lower():
        raise UsageError(
            "compare times the steps of one process, and asynchronous workers are several: lightning-accel bench "
            "suite=async_sgd compares them with one process and with DDP, lightning-accel bench suite=staleness their "
            "accuracy, and lightning-accel plan strategy=async_sgd says which is expected to win for this model."
        )
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    seeded = following_seed(cfg)
    plain = ConfiguredFit(config, accelerators=False, seeded=seeded)
    if settings.aa:
        return [_arm(PLAIN, plain), _arm(PLAIN_AGAIN, plain)]
    if not cfg.get("callbacks") and cfg.trainer.get("strategy", "auto") == "auto":
        raise UsageError(
            "there is nothing to compare: choose accelerators (callbacks=[rank_quantization]), a strategy, or compare "
            "the plain run with itself (compare --aa)."
        )
    unknown = [name for name in settings.baselines if name not in PEERS]
    if unknown:
        raise UsageError(f"`compare.baselines` must be among {', '.join(PEERS)}, got {unknown[0]}.")
    wanted = [*settings.baselines, *(free_alternatives(cfg) if settings.alternatives else [])]
    peers = [_arm(PEERS[name], dataclasses.replace(plain, peer=name)) for name in dict.fromkeys(wanted)]
    return [_arm(PLAIN, plain), _arm(ACCELERATED, dataclasses.replace(plain, accelerators=True)), *peers]


def plain_and_accelerated(experiment: str, overrides: Sequence[str]) -> dict[bool, MakeFit]:
    """Compose an experiment and return its fits without and with the accelerators."""
    cfg = compose("compare", [f"experiment={experiment}", "paths.output_dir=.", *overrides])
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    seeded = following_seed(cfg)
    return {acts: ConfiguredFit(config, accelerators=acts, seeded=seeded) for acts in (False, True)}


def following_seed(cfg: DictConfig) -> tuple[str, ...]:
    """Return the dotted keys whose values are that of ``seed``, and change with it.

    Arms get plain data, in which ``${seed}`` is resolved, so what follows the seed must be told: else all pairs would
    share the data of the first.
    """
    other = cfg.copy()
    other.seed = cfg.seed + 1
    here, there = (dict(_leaves(OmegaConf.to_container(c, resolve=True))) for c in (cfg, other))
    return tuple(
        key for key, value in here.items() if key != "seed" and (value, there.get(key)) == (cfg.seed, cfg.seed + 1)
    )


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _arm(name: str, fit: ConfiguredFit) -> Arm:
    settings = fit.config["compare"]
    return Arm(
        name,
        fit,
        # With caches the first run fills them, so it must be whole.
        make_warmup=dataclasses.replace(fit, is_warmup=True) if settings["cold"] else None,
        threads=available_cores() if fit.peer == "all_threads" else settings["threads"],
        # Counting operations makes a compiled module leave its compiled code.
        count_flops=fit.peer != "torch_compile",
    )


def fingerprint(cfg: DictConfig) -> str:
    """Return a short digest of everything that makes rows comparable: settings, versions, processor, threads."""
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    kept = {name: value for name, value in config.items() if name not in _FREE}
    kept["trainer"] = {k: v for k, v in config["trainer"].items() if k != "default_root_dir"}
    settings = cfg.compare
    kept["arms"] = [settings.aa, settings.cold, sorted(settings.baselines), settings.alternatives, settings.threads]
    kept["where"] = [version("lightning-accel"), {k: v for k, v in environment().items() if k != "threads"}]
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
