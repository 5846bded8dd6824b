"""``lightning-accel plan``: what the accelerators would do to this model on this machine, without training it.

One real training step is watched, and undone with the process. For the strategy and each callback that is composed, the
file of its name in this folder has the function ``sketch``, which shows what that one would do. If it has to watch the
step itself, it has ``watch(module, settings)`` as well, a context manager around it whose value is ``Scene.seen``.
"""

import contextlib
import copy
import functools
import importlib
import importlib.util
import os
import pkgutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from torch import Tensor, nn
from typing_extensions import override

from lightning_accel.cli.checkpoint import load_weights
from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.fit import build, build_callbacks, fit, quiet
from lightning_accel.cli.results import save_configuration
from lightning_accel.cli.terminal import open_console
from lightning_accel.low_rank import eligible_layers

_STRATEGY = "async_sgd"
_ONE_STEP = {
    "max_steps": 1,
    "limit_train_batches": 1,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "fast_dev_run": False,
}


class SeenInputs:
    """The inputs of layers that could be factored, in one step.

    Args:
        module: Watched from now until `stop`.
    """

    def __init__(self, module: LightningModule) -> None:
        self._inputs: dict[str, list[Tensor]] = {}
        layers, _ = eligible_layers(module)
        self._hooks = [
            layer.register_forward_pre_hook(functools.partial(self._note, name)) for name, layer in layers.items()
        ]

    def _note(self, name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            x = arguments[0]
            self._inputs.setdefault(name, []).append(x.detach().requires_grad_(x.requires_grad))

    def stop(self) -> None:
        """Watch no longer; what was seen is kept."""
        for hook in self._hooks:
            hook.remove()

    def replay(self, module: nn.Module) -> None:
        """Call each layer of ``module`` with what it got in the step."""
        for name, inputs in self._inputs.items():
            for x in inputs:
                module.get_submodule(name)(x)


@dataclass(frozen=True)
class Scene:
    """A model in the middle of its first training step, where everything about it can be seen.

    Attributes:
        module: On its device; its layers have just seen the batch.
        trainer: Of that step.
        inputs: What the layers got.
        settings: The callback's (or strategy's) block of the configuration, resolved.
        batch: Of the step.
        step_seconds: Wall time of the step up to now: of the first one, so an upper bound.
        devices: How many devices the configuration asks for.
        epochs: How long the training would be; ``None`` if it is not counted in epochs.
        folder: Where files go.
        console: Where tables go.
        seen: What the sketch's own ``watch`` gave, if it has one.
        loss: Of the step, where the backward pass is about to begin from it.
        simulation: Block ``simulation`` of the configuration.
    """

    module: LightningModule
    trainer: Trainer
    inputs: SeenInputs
    settings: dict[str, Any]
    batch: Any
    step_seconds: float
    devices: int
    epochs: int | None
    folder: Path
    console: Console
    seen: Any = None
    loss: Tensor | None = None
    simulation: dict[str, Any] = field(default_factory=dict)


def plan(cfg: DictConfig) -> None:
    """Show what the strategy and each callback of ``cfg.callbacks`` would do.

    Raises:
        UsageError: If no callback is chosen, or one has nothing that can be shown before training.
    """
    names = [str(name) for name in cfg.get("callbacks") or {}]
    if _is_asynchronous(cfg):
        names.insert(0, _STRATEGY)
    if not names:
        raise UsageError("No callback is chosen: add callbacks=[...]; lightning-accel plan --help lists them.")
    sketches = {name: _sketch(name) for name in names}
    folder = Path(cfg.paths.output_dir)
    console = open_console()
    build_callbacks(cfg, "callbacks")  # mistakes in their settings show here
    watch = _FirstStep(cfg, sketches, folder, console)
    with quiet():
        run = build(_for_one_step(cfg), accelerators=False, monitoring=False, loggers=False, extra_callbacks=[watch])
        if cfg.ckpt_path is not None:
            load_weights(run.model, cfg.ckpt_path)
        with contextlib.suppress(_AllShownError):
            fit(run)
    save_configuration(cfg, folder)
    console.print(f"results: {os.path.relpath(folder)}", markup=False, soft_wrap=True)


class _AllShownError(Exception):
    """Ends the step: there is nothing to train, and what was touched can not be differentiated."""


class _FirstStep(Callback):
    """Shows the scene once all layers have run: before the first backward, or after a step of manual optimization."""

    def __init__(self, cfg: DictConfig, sketches: dict[str, ModuleType], folder: Path, console: Console) -> None:
        self._cfg, self._sketches, self._folder, self._console = cfg, sketches, folder, console
        self._inputs: SeenInputs | None = None
        self._step = contextlib.ExitStack()
        self._seen: dict[str, Any] = {}
        self._batch: Any = None
        self._began = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._inputs = SeenInputs(pl_module)
        for name, sketch in self._sketches.items():
            if hasattr(sketch, "watch"):
                self._seen[name] = self._step.enter_context(sketch.watch(pl_module, self._settings(name)))
        self._batch, self._began = batch, time.perf_counter()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if pl_module.automatic_optimization:
            self._show(trainer, pl_module, loss)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor | None = None) -> None:
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            return
        seconds = time.perf_counter() - self._began
        inputs.stop()
        self._step.close()
        devices = self._cfg.trainer.get("devices")
        for name, sketch in self._sketches.items():
            sketch.sketch(
                Scene(
                    module=pl_module,
                    trainer=trainer,
                    inputs=inputs,
                    settings=self._settings(name),
                    batch=self._batch,
                    step_seconds=seconds,
                    devices=devices if isinstance(devices, int) else 1,
                    epochs=self._cfg.trainer.get("max_epochs"),
                    folder=self._folder,
                    console=self._console,
                    seen=self._seen.get(name),
                    loss=loss,
                    simulation=self._simulation(),
                )
            )
        raise _AllShownError

    def _simulation(self) -> dict[str, Any]:
        block = OmegaConf.to_container(self._cfg.get("simulation") or OmegaConf.create(), resolve=True)
        assert isinstance(block, dict)
        return {str(k): v for k, v in block.items()}

    def _settings(self, name: str) -> dict[str, Any]:
        block = self._cfg.trainer.strategy if name == _STRATEGY else self._cfg.callbacks[name]
        if not OmegaConf.is_config(block):
            return {}  # the strategy by its name alone
        settings = OmegaConf.to_container(block, resolve=True)
        assert isinstance(settings, dict)
        return {str(k): v for k, v in settings.items() if k != "_target_"}


def _sketch(name: str) -> ModuleType:
    home = f"{__name__}.{name}"
    if importlib.util.find_spec(home) is None:
        known = sorted(entry.name for entry in pkgutil.iter_modules(__path__))
        raise UsageError(f"`{name}` has nothing to show before training. There are plans for: {', '.join(known)}.")
    return importlib.import_module(home)


def _is_asynchronous(cfg: DictConfig) -> bool:
    strategy = cfg.trainer.get("strategy")
    name = strategy.get("_target_", "") if OmegaConf.is_config(strategy) else strategy
    return str(name).endswith("AsyncSGDStrategy") or name == _STRATEGY


def _for_one_step(cfg: DictConfig) -> DictConfig:
    short = copy.deepcopy(cfg)
    with open_dict(short):
        short.trainer.update(_ONE_STEP)
        short.trainer.update({"strategy": "auto", "devices": 1})  # one process sees all there is to see
    return short
