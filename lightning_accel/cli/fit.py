"""From a composed configuration to a trainer, a module and data, and through a fit.

`build` and `fit` are what ``train`` and ``compare`` share::

    run = build(cfg)                       # seeds, then data, model, callbacks, loggers, trainer
    plain = build(cfg, accelerators=False) # the same without cfg.callbacks
    metrics = fit(run)                     # numbers the model logged, and speed
"""

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from lightning_accel.cli.compose import instantiate
from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.launch import Interrupted
from lightning_accel.cli.speed import Speed


@dataclass
class Run:
    """What a configuration describes, built.

    Attributes:
        model: The module, freshly initialized under ``cfg.seed``.
        data: The data module, or ``None`` where ``cfg.data`` is null.
        accelerators: The callbacks of ``cfg.callbacks``, in the order of the list.
        trainer: Has these and the callbacks of ``cfg.monitoring``.
        speed: Counts training batches and their seconds.
    """

    model: LightningModule
    data: LightningDataModule | None
    accelerators: list[Callback]
    trainer: Trainer
    speed: Speed = field(repr=False)


def build(
    cfg: DictConfig,
    *,
    accelerators: bool = True,
    monitoring: bool = True,
    loggers: bool = True,
    extra_callbacks: Sequence[Callback] = (),
    root_dir: Path | str | None = None,
) -> Run:
    """Seed everything with ``cfg.seed`` and build data, model, callbacks, loggers and trainer.

    Two calls with one configuration give models with equal weights and data in equal order.

    Args:
        cfg: A configuration composed from ``conf/train.yaml`` or one that includes it.
        accelerators: Whether to add ``cfg.callbacks``.
        monitoring: Whether to add ``cfg.monitoring`` (progress bar, checkpoints). Without, the trainer has neither.
        loggers: Whether to add ``cfg.logger``. Without, the trainer logs nowhere.
        extra_callbacks: More callbacks, behind the others.
        root_dir: Overrides ``cfg.trainer.default_root_dir``.

    Raises:
        UsageError: If a part can not be built from its configuration, or is not what its group is for.
    """
    if cfg.get("model") is None:
        raise UsageError("There is no model: choose one, e.g. model=mlp.")
    seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data, name="data") if cfg.get("data") is not None else None
    model = instantiate(cfg.model, name="model")
    _check(model, LightningModule, "model")
    chosen = build_callbacks(cfg, "callbacks") if accelerators else []
    watching = build_callbacks(cfg, "monitoring") if monitoring else []
    speed = Speed()
    given: dict[str, object] = {
        "callbacks": [*chosen, *watching, *extra_callbacks, speed],
        "logger": build_loggers(cfg) if loggers else False,
    }
    if not monitoring:
        given |= {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    else:  # what was taken out of the list must not come back as Lightning's default
        given["enable_checkpointing"] = any(_is_a(callback, "Checkpoint") for callback in watching)
        given["enable_progress_bar"] = any(_is_a(callback, "ProgressBar") for callback in watching)
    if root_dir is not None:
        given["default_root_dir"] = str(root_dir)
    trainer = instantiate(cfg.trainer, name="trainer", **given)
    return Run(model=model, data=data, accelerators=chosen, trainer=trainer, speed=speed)


def build_callbacks(cfg: DictConfig, group: str) -> list[Callback]:
    """Build the callbacks of a group, in the order of its keys.

    Raises:
        UsageError: If one can not be built or is not a Lightning callback.
    """
    built = _build_group(cfg, group)
    for key, callback in built.items():
        _check(callback, Callback, f"{group}.{key}")
    return cast(list[Callback], list(built.values()))


def build_loggers(cfg: DictConfig) -> list[Logger]:
    """Build the loggers of ``cfg.logger``; none means that nothing is logged.

    Raises:
        UsageError: If one can not be built or is not a Lightning logger.
    """
    built = _build_group(cfg, "logger")
    for key, logger in built.items():
        _check(logger, Logger, f"logger.{key}")
    return cast(list[Logger], list(built.values()))


def fit(run: Run, *, ckpt_path: str | None = None, test: bool = False) -> dict[str, float]:
    """Fit, optionally test the best state, and return what was logged plus the speed.

    Args:
        run: From `build`.
        ckpt_path: Checkpoint to resume from.
        test: Whether to test afterwards, with the state of the best checkpoint if checkpoints are kept. Data without
            a test set are left untested.

    Returns:
        The logged metrics, and ``fit_seconds`` (wall time of the whole fit, set-up included),
        ``batches_per_second`` and, where batches tell their size, ``samples_per_second`` of training alone.

    Raises:
        UsageError: If ``ckpt_path`` is no file.
        Interrupted: On Ctrl-C; says which checkpoint was kept.
    """
    if ckpt_path is not None and not Path(ckpt_path).is_file():
        raise UsageError(
            f"`ckpt_path` must be a checkpoint file, got {ckpt_path}. A run keeps its own in checkpoints/."
        )
    start = time.perf_counter()
    with _interruptible(run.trainer):
        run.trainer.fit(run.model, datamodule=run.data, ckpt_path=ckpt_path)
    metrics = {name: float(value) for name, value in run.trainer.callback_metrics.items()}
    metrics["fit_seconds"] = time.perf_counter() - start
    if run.speed.seconds > 0.0 and run.speed.batches:
        metrics["batches_per_second"] = run.speed.batches / run.speed.seconds
        if run.speed.samples is not None:
            metrics["samples_per_second"] = run.speed.samples / run.speed.seconds
    if test and _has_test_data(run):
        best = "best" if best_checkpoint(run.trainer) else None
        with _interruptible(run.trainer):
            run.trainer.test(run.model, datamodule=run.data, ckpt_path=best, verbose=False)
        metrics |= {name: float(value) for name, value in run.trainer.callback_metrics.items()}
    return metrics


def example_input(model: LightningModule, cfg: DictConfig) -> tuple[Any, ...]:
    """Return, on CPU, what ``model.forward`` gets in a real evaluation step; weights and mode stay as they are.

    Args:
        model: Evaluated on one batch of ``cfg.data``.
        cfg: With ``data``, ``trainer`` and ``seed``.

    Raises:
        UsageError: If there are no data, or the steps of the model do not call its ``forward``.
    """
    if cfg.get("data") is None:
        raise UsageError("There are no data to check the model with: choose some, e.g. data=digits.")
    data = instantiate(cfg.data, name="data")
    seen: list[tuple[Any, ...]] = []
    handle = model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments) if not seen else None)
    training = model.training
    try:
        with quiet():
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                limit_val_batches=1,
                limit_test_batches=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                inference_mode=False,  # its tensors could not be used again
            )
            if type(data).val_dataloader is not LightningDataModule.val_dataloader:
                trainer.validate(model, datamodule=data, verbose=False)
            else:
                trainer.test(model, datamodule=data, verbose=False)
    finally:
        handle.remove()
        model.train(training)
    if not seen:
        raise UsageError(f"The steps of {type(model).__name__} do not call its `forward`: there is nothing to export.")
    return tuple(argument.detach().cpu() if isinstance(argument, torch.Tensor) else argument for argument in seen[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning says about a Trainer that makes one step only, and is no run of the user's."""
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(before)


def best_checkpoint(trainer: Trainer) -> str | None:
    """Return the path of the best checkpoint of a fit, if one was written."""
    callback = trainer.checkpoint_callback
    path = getattr(callback, "best_model_path", "")
    return path if path and Path(path).exists() else None


def _build_group(cfg: DictConfig, group: str) -> dict[str, object]:
    nodes = cfg.get(group)
    if nodes is None:
        return {}
    if not isinstance(nodes, DictConfig):
        raise UsageError(f"`{group}` must hold one block per name, got {nodes}. Write {group}=[option,option].")
    built: dict[str, object] = {}
    for key in map(str, nodes):
        node = nodes[key]
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise UsageError(f"`{group}.{key}` must be a block with a `_target_`, got {node}.")
        built[key] = instantiate(node, name=f"{group}.{key}")
    return built


def _check(built: object, wanted: type, name: str) -> None:
    if not _is_a(built, wanted.__name__):
        raise UsageError(f"`{name}._target_` must name a {wanted.__name__} of Lightning, got {type(built).__name__}.")


def _is_a(built: object, name: str) -> bool:
    # by name: `pytorch_lightning` has classes of its own with the same names
    return name in {base.__name__ for base in type(built).__mro__}


def _has_test_data(run: Run) -> bool:
    if run.data is None:
        return type(run.model).test_dataloader is not LightningModule.test_dataloader
    return type(run.data).test_dataloader is not LightningDataModule.test_dataloader


@contextlib.contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """Tell Ctrl-C from a failure: Lightning shuts down gracefully, then exits with 1 for both."""
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        last = getattr(trainer.checkpoint_callback, "last_model_path", "") or best_checkpoint(trainer)
        short = os.path.relpath(last) if last else ""
        kept = f"Kept {short}: go on with ckpt_path={short}" if last else "No checkpoint was kept."
        raise Interrupted(f"Interrupted. {kept}") from error
