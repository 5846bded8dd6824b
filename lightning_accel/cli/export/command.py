"""``lightning-accel export``: a checkpoint in, a plain model out that needs nothing of this package."""

import copy
import logging
import math
import os
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_accel.cli.checkpoint import load_weights, prepare_layers
from lightning_accel.cli.compose import instantiate
from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.export.shrink import check_zero_groups, remove_zero_groups, report_speed, write_kept
from lightning_accel.cli.fit import example_input
from lightning_accel.low_rank import low_rank_layers, merge
from lightning_accel.measure import compare_paired, time_interleaved

FORMATS = ("checkpoint", "torch_export", "onnx")
LOW_RANK = ("merge", "keep", "fastest")
# Multiplying factors rounds anew. Relative to the largest output.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_KEPT = ("hyper_parameters", "hparams_name", "datamodule_hyper_parameters", "pytorch-lightning_version", "epoch")


class ExportError(RuntimeError):
    """What was written is not what was read."""


def export(cfg: DictConfig) -> None:
    """Load ``cfg.ckpt``, merge low-rank layers, remove zero groups, write ``cfg.out``, check that outputs are equal.

    Raises:
        UsageError: If a setting is out of range, or the checkpoint does not fit the model.
        ExportError: If the written model does not compute what the checkpoint's does; the file is removed.
    """
    if cfg.format not in FORMATS:
        raise UsageError(f"`format` must be one of {', '.join(FORMATS)}, got {cfg.format}.")
    if cfg.low_rank not in LOW_RANK:
        raise UsageError(f"`low_rank` must be one of {', '.join(LOW_RANK)}, got {cfg.low_rank}.")
    if cfg.format == "checkpoint" and cfg.low_rank != "merge":
        raise UsageError(
            f"A plain checkpoint has dense layers only: low_rank={cfg.low_rank} needs format=torch_export or onnx, "
            "which hold the computation, too."
        )
    check_zero_groups(cfg.zero_groups, cfg.format)
    console = Console(highlight=False)
    described = _description(cfg)
    model: LightningModule = instantiate(described.model, name="model")
    checkpoint = load_weights(model, cfg.ckpt, weights_only=cfg.weights_only)
    model.eval()
    inputs = example_input(model, described)
    with torch.no_grad():
        expected = model(*inputs)
    factored = low_rank_layers(model)
    entries = sum(parameter.numel() for parameter in model.parameters())
    before = copy.deepcopy(model)
    merged = _merge(model, cfg.low_rank, inputs, console)
    small = remove_zero_groups(model, inputs, zero_groups=cfg.zero_groups, file_format=cfg.format, console=console)
    model = model if small is None else cast(LightningModule, small.model)
    with torch.no_grad():
        off = largest_difference(expected, model(*inputs))
    out = Path(cfg.out) if cfg.out is not None else Path(cfg.paths.output_dir) / _file_name(cfg.format)
    out.parent.mkdir(parents=True, exist_ok=True)
    if cfg.format == "checkpoint":
        torch.save(plain_checkpoint(model, checkpoint), out)
        fresh = instantiate(described.model, name="model")
        _load_plain(fresh, out)
        off = max(off, _difference_of(fresh, model, inputs))
    elif cfg.format == "torch_export":
        torch.export.save(torch.export.export(_Forward(model).eval(), inputs, dynamic_shapes=_any_batch(inputs)), out)
        off = max(off, _difference_of(torch.export.load(out).module(), model, inputs))
    else:
        off = max(off, _write_onnx(model, inputs, out))
    _verify(off, model, out)
    after = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{len(factored)} low-rank layers in the checkpoint, {len(merged)} merged into dense ones.")
    console.print(f"{entries:,} -> {after:,} parameters; outputs differ by {off:.1e} of the largest.", markup=False)
    if merged or small is not None:
        console.print(report_speed(before, model, inputs), markup=False, soft_wrap=True)
    if small is not None:
        write_kept(small, out.with_suffix(".kept.json"))
        console.print(f"What is left: {os.path.relpath(out.with_suffix('.kept.json'))}", markup=False, soft_wrap=True)
    console.print(f"Written: {os.path.relpath(out)} ({_how_to_load(cfg.format)})", markup=False, soft_wrap=True)


def plain_checkpoint(model: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return weights and hyper-parameters alone, as ``load_from_checkpoint`` of the plain class wants them."""
    kept = {key: checkpoint[key] for key in _KEPT if key in checkpoint}
    return {**kept, "global_step": checkpoint.get("global_step", 0), "state_dict": model.state_dict()}


def largest_difference(expected: object, actual: object) -> float:
    """Return the largest absolute difference of two outputs, relative to the largest entry of the first."""
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True)
    off = 0.0
    for a, b in pairs:
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            equal = (a == b) | (a.isnan() & b.isnan())
            gap = (a - b).abs().masked_fill(equal, 0.0).nan_to_num(nan=math.inf, posinf=math.inf).max()
            scale = max(float(a.abs().nan_to_num(0.0, posinf=0.0).max()), torch.finfo(a.dtype).tiny)
            off = max(off, float(gap) / scale)
    return off


class _Forward(nn.Module):
    """A LightningModule without what a Trainer needs, which `torch.export` can not trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        return self.model(*inputs)


def _description(cfg: DictConfig) -> DictConfig:
    """Return the configuration of model and data: as given, else as the run saved it beside its checkpoint."""
    given = any(override.lstrip("+~").startswith("model") for override in HydraConfig.get().overrides.task)
    saved = Path(cfg.ckpt).resolve().parent.parent / "config.yaml"
    if given or not saved.is_file():
        return cfg
    loaded = OmegaConf.load(saved)
    return loaded if isinstance(loaded, DictConfig) and "model" in loaded else cfg


def _merge(model: nn.Module, low_rank: str, inputs: tuple[Any, ...], console: Console) -> list[str]:
    if low_rank == "keep" or not low_rank_layers(model):
        return []
    if low_rank == "merge":
        return merge(model)
    dense = copy.deepcopy(model)
    merge(dense)
    with torch.inference_mode():
        times = time_interleaved(
            {"dense": lambda: dense(*inputs), "low rank": lambda: model(*inputs)}, rounds=12, warmup=3
        )
    ratio = compare_paired(times["dense"], times["low rank"])
    console.print(f"Low rank is {ratio.median:.2f} times as fast as dense here ({ratio.verdict}).", markup=False)
    return [] if ratio.verdict == "faster" else merge(model)


def _load_plain(model: nn.Module, path: Path) -> None:
    prepare_layers(model)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=False)["state_dict"], strict=True)
    model.eval()


def _difference_of(written: Any, model: nn.Module, inputs: tuple[Any, ...]) -> float:
    with torch.no_grad():
        return largest_difference(model(*inputs), written(*inputs))


def _any_batch(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Leave the first size of every tensor open, where the model allows it."""
    auto = torch.export.Dim.AUTO
    return (pytree.tree_map(lambda x: {0: auto} if isinstance(x, Tensor) and x.dim() else None, inputs),)


def _write_onnx(model: nn.Module, inputs: tuple[Any, ...], out: Path) -> float:
    """Write the file, run it by the reference implementation of ONNX, and return how far its outputs are off."""
    try:
        import onnxscript  # noqa: F401  # what torch writes with
        from onnx.reference import ReferenceEvaluator
    except ImportError:
        raise UsageError("format=onnx needs onnx: pip install 'lightning-accel[onnx]'.") from None
    for chatty in ("onnxscript", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    shapes = _any_batch(inputs)
    torch.onnx.export(
        _Forward(model).eval(), inputs, out, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
    )
    evaluator = ReferenceEvaluator(str(out))
    tensors = [x.numpy() for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    actual = evaluator.run(None, dict(zip(evaluator.input_names, tensors, strict=True)))
    with torch.no_grad():
        return largest_difference(pytree.tree_leaves(model(*inputs)), [torch.as_tensor(a) for a in actual])


def _verify(off: float, model: nn.Module, out: Path) -> None:
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
    allowed = max(_TOLERANCES.get(kind, 5e-2) for kind in kinds)
    if not off <= allowed:
        out.unlink(missing_ok=True)
        raise ExportError(f"outputs differ by {off:.1e} of the largest, more than {allowed:.0e}; nothing was written.")


def _file_name(file_format: str) -> str:
    return {"checkpoint": "plain.ckpt", "torch_export": "model.pt2", "onnx": "model.onnx"}[file_format]


def _how_to_load(file_format: str) -> str:
    return {
        "checkpoint": "load_from_checkpoint of the plain class",
        "torch_export": "torch.export.load(path).module()",
        "onnx": "any ONNX runtime",
    }[file_format]
