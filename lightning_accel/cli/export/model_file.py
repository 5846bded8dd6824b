"""Export from Python: any module in, a file out that needs nothing of this package, checked by running both."""

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_accel.callbacks import load_from_checkpoint
from lightning_accel.cli.checkpoint import load_weights, read_checkpoint
from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.export.formats import (
    FORMATS,
    SUFFIXES,
    Forward,
    Inputs,
    Runner,
    differs_in_batch,
    load_plain,
    plain_checkpoint,
    write_onnx,
    write_program,
)
from lightning_accel.cli.export.shrink import check_zero_groups, remove_zero_groups, report_speed
from lightning_accel.low_rank import low_rank_layers, merge
from lightning_accel.measure import compare_paired, time_interleaved
from lightning_accel.projection import Shrunk
from lightning_accel.projection.shrink.keep_state import copy_module
from lightning_accel.projection.shrink.nested import tensors_in, with_tensors
from lightning_accel.projection.shrink.probes import make_probes
from lightning_accel.projection.shrink.readings import difference, forward

LOW_RANK = ("merge", "keep", "fastest")
# Multiplying factors rounds anew. Relative to the largest output.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_SEED = 4  # of inputs beside the example; another than that of `shrink`


@dataclass(frozen=True)
class Settings:
    """How to export; see `export`."""

    file_format: str
    low_rank: str = "merge"
    zero_groups: str | None = None


class ExportError(RuntimeError):
    """What was written is not what was read."""


@dataclass
class Exported:
    """What `export` returns.

    Attributes:
        path: Of the file.
        model: The plain module that was written, on CPU; modes and frozen parameters are those of the given one.
        merged: Low-rank layers that became dense ones.
        shrunk: What was removed of zero groups, or ``None``.
        parameters_before: Entries of all parameters.
        parameters_after: As ``parameters_before``.
        largest_difference: Of outputs between the given model and the file, relative to the largest.
        inputs_compared: On how many inputs.
        notes: What was done and left, one sentence each.
    """

    path: Path
    model: nn.Module
    merged: list[str] = field(default_factory=list)
    shrunk: Shrunk | None = None
    parameters_before: int = 0
    parameters_after: int = 0
    largest_difference: float = 0.0
    inputs_compared: int = 0
    notes: list[str] = field(default_factory=list)


def export(
    model: nn.Module | type[LightningModule],
    out: str | Path,
    example_inputs: Any = None,
    *,
    checkpoint: str | Path | None = None,
    format: str | None = None,  # as in the command
    low_rank: str = "merge",
    zero_groups: str | None = None,
    weights_only: bool = True,
    init_arguments: Mapping[str, object] | None = None,
) -> Exported:
    """Write a plain model that needs nothing of this package: low-rank layers merged, zero groups removed.

    ::

        lightning_accel.export(model, "model.onnx", example_inputs=x)           # a module as it is now
        lightning_accel.export(MyModule, "plain.ckpt", checkpoint="last.ckpt")  # a class and its checkpoint

    The file is loaded and run, on the example and on variations of it (noise, masks drawn anew, another batch size);
    its outputs must be those of the model in ``eval`` mode. The model itself is not changed.

    Args:
        model: Any module, or the class of a LightningModule, made by its ``load_from_checkpoint``.
        out: File to write.
        example_inputs: One tensor, or the tuple of ``forward``'s arguments; by default the module's
            ``example_input_array`` (a dict of it are arguments by name, which programs take in their order).
        checkpoint: Whose weights to load first, through the module's own hooks; must be given for a class.
        format: ``"checkpoint"`` (for ``load_from_checkpoint`` of the plain class), ``"torch_export"`` (a program), or
            ``"onnx"``; by default what the ending of ``out`` says: .ckpt, .pt2, .onnx.
        low_rank: ``"merge"`` factors into dense layers, ``"keep"`` them, or whichever is ``"fastest"`` here.
        zero_groups: ``"remove"`` groups of zeros, ``"keep"`` them, or ``None``: remove where the format can.
        weights_only: Refuse checkpoints that hold more than tensors and plain data, and can run code.
        init_arguments: Of a class: constructor's arguments that its checkpoint does not have, or that override them.

    Raises:
        ValueError: If an argument is out of range, there are no example inputs, or the checkpoint does not fit.
        CannotWriteError: If the model can not be written in that format (a ValueError).
        ExportError: If the file does not compute what the model does; one that was there before stays.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_accel import export
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        >>> written = export(model, "plain.pt", torch.randn(2, 8))
    """
    out = Path(out)
    chosen = SUFFIXES.get(out.suffix, "checkpoint") if format is None else format
    notes: list[str] = []
    try:
        check_settings(chosen, low_rank, zero_groups)
        source, loaded = _loaded(model, checkpoint, weights_only, init_arguments or {})
        args, kwargs = example_of(source) if example_inputs is None else (as_arguments(example_inputs), {})
        settings = Settings(chosen, low_rank, zero_groups)
        exported = write(source, args, kwargs, out, settings, checkpoint=loaded, say=notes.append)
    except UsageError as error:
        raise ValueError(str(error)) from None
    exported.notes = notes
    return exported


def check_settings(file_format: str, low_rank: str, zero_groups: str | None) -> None:
    """Refuse what is out of range, or what a format can not hold.

    Raises:
        UsageError: If so.
    """
    if file_format not in FORMATS:
        raise UsageError(f"`format` must be one of {', '.join(FORMATS)}, got {file_format}.")
    if low_rank not in LOW_RANK:
        raise UsageError(f"`low_rank` must be one of {', '.join(LOW_RANK)}, got {low_rank}.")
    if file_format == "checkpoint" and low_rank != "merge":
        raise UsageError(
            f"A plain checkpoint has dense layers only: low_rank={low_rank} needs format=torch_export or onnx, "
            "which hold the computation, too."
        )
    check_zero_groups(zero_groups, file_format)


def write(
    source: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Path,
    settings: Settings,
    *,
    checkpoint: dict[str, Any],
    say: Callable[[str], None],
    build: Callable[[], nn.Module] | None = None,
) -> Exported:
    """Do the work of `export`, with all that it needs; ``build`` makes a module to load a checkpoint into."""
    args, kwargs = with_tensors((args, kwargs), lambda x: x.detach().cpu())
    before = copy_module(source).cpu().eval()
    model = copy_module(before)
    entries = _entries(before)
    factored = len(low_rank_layers(model))
    merged = _merge(model, settings.low_rank, args, kwargs, say)
    small = remove_zero_groups(
        model, args, kwargs, zero_groups=settings.zero_groups, file_format=settings.file_format, say=say
    )
    if small is not None:
        model = small.model.eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    positional = Forward(model, tuple(kwargs)).eval()
    inputs = (*args, *kwargs.values())
    # aside until it has been checked: a file of this name stays if something goes wrong, and may be the checkpoint
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        aside = Path(folder) / out.name
        if settings.file_format == "checkpoint":
            torch.save(plain_checkpoint(model, checkpoint), aside)
            fresh = Forward(load_plain(aside, model, build), tuple(kwargs))
            runner: Runner = lambda given: forward(fresh, (given, {}))  # noqa: E731
        else:
            writer = {"torch_export": write_program, "onnx": write_onnx}[settings.file_format]
            runner = writer(positional, inputs, aside)
        off, count = _compared(Forward(before, tuple(kwargs)), runner, inputs, say)
        _verify(off, before)
        os.replace(aside, out)
    say(f"{factored} low-rank layers in the checkpoint, {len(merged)} merged into dense ones.")
    say(f"{entries:,} -> {_entries(model):,} parameters; outputs differ by {off:.1e} of the largest on {count} inputs.")
    if merged or small is not None:
        say(report_speed(Forward(before, tuple(kwargs)), positional, inputs))
    modes = {name: module.training for name, module in source.named_modules()}
    for name, module in model.named_modules():
        module.training = modes.get(name, source.training)
    return Exported(out, model, merged, small, entries, _entries(model), off, count)


def _compared(model: nn.Module, runner: Runner, inputs: Inputs, say: Callable[[str], None]) -> tuple[float, int]:
    """Return by how much outputs differ, relative to the largest, and on how many inputs that was looked at."""
    off, count, refused = 0.0, 0, False
    for given, _ in make_probes(inputs, {}, lambda probe: forward(model, probe), _SEED).inputs:
        other_batch = differs_in_batch(inputs, given)
        if other_batch is None:
            continue
        expected = tensors_in(forward(model, (given, {})))
        try:
            with torch.no_grad():
                actual = tensors_in(runner(given))
        except Exception as error:
            if not other_batch:
                raise ExportError(f"what was written does not run on other values: {error}") from error
            refused = True  # a program says so that it was made for one size
            continue
        count += 1
        if len(expected) != len(actual):
            return math.inf, count
        for a, b in zip(expected, actual, strict=True):
            alike = a.is_floating_point() == b.is_floating_point()
            off = max(off, difference(a, b.to(a.dtype) if alike else b))
    if refused:
        say("It takes batches of the example's size only, for the model counts on that size.")
    return off, count


def _loaded(
    model: nn.Module | type[LightningModule],
    checkpoint: str | Path | None,
    weights_only: bool,
    init_arguments: Mapping[str, object],
) -> tuple[nn.Module, dict[str, Any]]:
    if isinstance(model, type):
        if checkpoint is None:
            raise UsageError(f"`checkpoint` must be given for a class, got None: {model.__name__}'s weights are there.")
        return load_class(model, checkpoint, weights_only=weights_only, init_arguments=init_arguments)
    if not isinstance(model, nn.Module):
        raise UsageError(f"`model` must be a module or the class of a LightningModule, got {type(model).__name__}.")
    if checkpoint is None:
        return model, {}
    copied = copy_module(model)
    return copied, load_weights(copied, checkpoint, weights_only=weights_only)


def load_class(
    module_class: type[LightningModule],
    path: str | Path,
    *,
    weights_only: bool = True,
    init_arguments: Mapping[str, object] | None = None,
) -> tuple[LightningModule, dict[str, Any]]:
    """Make a module by its class's own ``load_from_checkpoint``, low-rank layers included; return the checkpoint too.

    Raises:
        UsageError: If the file can not be read, or does not fit the class.
    """
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    if "LightningModule" not in {base.__name__ for base in module_class.__mro__}:
        raise UsageError(f"`model` must be the class of a LightningModule, got {module_class.__name__}.")
    given: dict[str, Any] = {"map_location": "cpu", "weights_only": weights_only}
    try:
        if any(key.endswith("factor_in") for key in checkpoint["state_dict"]):
            module = load_from_checkpoint(module_class, path, **given, init_arguments=init_arguments)
        else:
            module = module_class.load_from_checkpoint(path, **given, **dict[str, Any](init_arguments or {}))
    except Exception as error:  # of the constructor or of the module's own hooks
        raise UsageError(
            f"{path} does not fit {module_class.__name__}: {type(error).__name__}: {_shortened(error)}. Arguments of "
            "the constructor that the checkpoint does not have are model.NAME=VALUE, or `init_arguments` in Python."
        ) from error
    return module, checkpoint


def as_arguments(example: Any) -> tuple[Any, ...]:
    """Return the positional arguments that an example means: a tuple (no named one), or one argument."""
    return example if isinstance(example, tuple) and not hasattr(example, "_fields") else (example,)


def example_of(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments in a module's ``example_input_array``.

    Raises:
        UsageError: If it has none.
    """
    example = getattr(model, "example_input_array", None)
    if example is None:
        raise UsageError(
            f"There is no input to check {type(model).__name__} with: give data=..., let it have an "
            "`example_input_array`, or pass `example_inputs` in Python."
        )
    return ((), dict(example)) if isinstance(example, Mapping) else (as_arguments(example), {})


def _merge(
    model: nn.Module, low_rank: str, args: tuple[Any, ...], kwargs: dict[str, Any], say: Callable[[str], None]
) -> list[str]:
    if low_rank == "keep" or not low_rank_layers(model):
        return []
    if low_rank == "merge":
        return merge(model)
    dense = copy_module(model)
    merge(dense)
    with torch.inference_mode():
        times = time_interleaved(
            {"dense": lambda: dense(*args, **kwargs), "low rank": lambda: model(*args, **kwargs)}, rounds=12, warmup=3
        )
    ratio = compare_paired(times["dense"], times["low rank"])
    say(f"Low rank is {ratio.median:.2f} times as fast as dense here ({ratio.verdict}).")
    return [] if ratio.verdict == "faster" else merge(model)


def _verify(off: float, model: nn.Module) -> None:
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
    allowed = max(_TOLERANCES.get(kind, 5e-2) for kind in kinds)
    if not off <= allowed:
        raise ExportError(f"outputs differ by {off:.1e} of the largest, more than {allowed:.0e}; nothing was written.")


def _entries(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".:")
