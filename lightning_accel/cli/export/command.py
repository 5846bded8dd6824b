"""``lightning-accel export``: a checkpoint in, a plain model out that needs nothing of this package."""

import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_accel.cli.checkpoint import load_weights
from lightning_accel.cli.compose import instantiate
from lightning_accel.cli.errors import UsageError, did_you_mean, parameters
from lightning_accel.cli.export.formats import CannotWriteError
from lightning_accel.cli.export.model_file import Settings, check_settings, example_of, load_class, write
from lightning_accel.cli.export.shrink import write_kept
from lightning_accel.cli.fit import example_input
from lightning_accel.cli.terminal import open_console


def export(cfg: DictConfig) -> None:
    """Load ``cfg.ckpt``, merge low-rank layers, remove zero groups, write ``cfg.out``, check that outputs are equal.

    Raises:
        UsageError: If a setting is out of range, the checkpoint does not fit the model, or the format can not hold it.
        ExportError: If the written model does not compute what the checkpoint's does; nothing is written.
    """
    settings = Settings(cfg.format, cfg.low_rank, cfg.zero_groups)
    check_settings(settings.file_format, settings.low_rank, settings.zero_groups)
    console = open_console()
    say = partial(console.print, markup=False, soft_wrap=True)
    described = _description(cfg)
    model, checkpoint, build = _model(cfg, described)
    args, kwargs = _inputs(model, described)
    out = Path(cfg.out) if cfg.out is not None else Path(cfg.paths.output_dir) / _file_name(cfg.format)
    try:
        done = write(model, args, kwargs, out, settings, checkpoint=checkpoint, say=say, build=build)
    except CannotWriteError as error:
        raise UsageError(str(error)) from error
    if done.shrunk is not None:
        write_kept(done.shrunk, out.with_suffix(".kept.json"))
        say(f"What is left: {os.path.relpath(out.with_suffix('.kept.json'))}")
    say(f"Written: {os.path.relpath(out)} ({_how_to_load(cfg.format)})")


def _description(cfg: DictConfig) -> DictConfig:
    """Return the configuration of model and data: as given, else as the run saved it beside its checkpoint."""
    given = any(override.lstrip("+~").startswith("model") for override in HydraConfig.get().overrides.task)
    saved = Path(cfg.ckpt).resolve().parent.parent / "config.yaml"
    if given or not saved.is_file():
        return cfg
    loaded = OmegaConf.load(saved)
    return loaded if isinstance(loaded, DictConfig) and "_target_" in (loaded.get("model") or {}) else cfg


def _model(cfg: DictConfig, described: DictConfig) -> tuple[nn.Module, dict[str, Any], Callable[[], nn.Module] | None]:
    """Return the module with its weights, the checkpoint, and what makes a fresh module."""
    node = described.get("model")
    if node is None:
        raise UsageError("There is no model: choose one, e.g. model=mlp, or a class of yours: model=module.Class.")
    if described is not cfg or HydraConfig.get().runtime.choices.get("model") is not None:
        make = partial(instantiate, node, name="model")
        module: nn.Module = make()
        return module, load_weights(module, cfg.ckpt, weights_only=cfg.weights_only), make
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where the user's modules are, as with `python -m`
    found = _class_of(str(node.get("_target_")))
    arguments = OmegaConf.to_container(node, resolve=True)
    assert isinstance(arguments, dict)
    named = {str(key): value for key, value in arguments.items() if key != "_target_"}
    _refuse_unknown(str(node.get("_target_")), found, named)
    loaded, checkpoint = load_class(found, cfg.ckpt, weights_only=cfg.weights_only, init_arguments=named)
    return loaded, checkpoint, None


def _class_of(target: str) -> type[LightningModule]:
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"`model` names {target}, which can not be imported: {error}. It is looked for here, too."
        ) from None
    if not (isinstance(found, type) and "LightningModule" in {base.__name__ for base in found.__mro__}):
        raise UsageError(f"`model` must name the class of a LightningModule, got {target}.")
    return found


def _refuse_unknown(target: str, found: type, named: dict[str, object]) -> None:
    """Refuse arguments that a constructor does not take: ``load_from_checkpoint`` would drop them in silence."""
    kinds = {parameter.kind for parameter in inspect.signature(found).parameters.values()}
    unknown = sorted(set(named) - set(parameters(target)))
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        hint = did_you_mean(unknown[0], parameters(target))
        raise UsageError(f"`model.{unknown[0]}`: {target} takes no `{unknown[0]}`. {hint}".rstrip())


def _inputs(model: nn.Module, described: DictConfig) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what ``forward`` gets in a step on the data; without any, the module's own example."""
    if described.get("data") is None:
        return example_of(model)
    return example_input(cast(LightningModule, model), described), {}


def _file_name(file_format: str) -> str:
    return {"checkpoint": "plain.ckpt", "torch_export": "model.pt2", "onnx": "model.onnx"}[file_format]


def _how_to_load(file_format: str) -> str:
    return {
        "checkpoint": "load_from_checkpoint of the plain class",
        "torch_export": "torch.export.load(path).module()",
        "onnx": "any ONNX runtime",
    }[file_format]
