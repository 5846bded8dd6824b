"""Files that ``export`` writes, and how each is run to see that it computes what the model does."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_accel.cli.checkpoint import is_lightning_module, loading_hooks, prepare_layers
from lightning_accel.lightning_private import hparams_name
from lightning_accel.projection.shrink.keep_state import copy_module
from lightning_accel.projection.shrink.nested import tensors_in

FORMATS = ("checkpoint", "torch_export", "onnx")
SUFFIXES = {".ckpt": "checkpoint", ".pt": "checkpoint", ".pth": "checkpoint", ".pt2": "torch_export", ".onnx": "onnx"}
# what of a checkpoint belongs to the training that made it
_OF_TRAINING = {
    *("state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers"),
    *("MixedPrecision", "hparams_type", "sharded_state_dict"),
}
Inputs = tuple[Any, ...]  # all positional
Runner = Callable[[Inputs], object]


class CannotWriteError(ValueError):
    """A model that a format can not hold. The message says which, why and what to do."""


class Forward(nn.Module):
    """A module without what a Trainer needs, which `torch.export` can not trace; all arguments are positional.

    Args:
        model: Any module.
        names: Of the last arguments, which the model takes by name.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Any) -> Any:
        """Call the model."""
        positional = len(inputs) - len(self.names)
        return self.model(*inputs[:positional], **dict(zip(self.names, inputs[positional:], strict=True)))


def plain_checkpoint(model: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return weights, hyper-parameters and what the module itself keeps in checkpoints, without the training's state.

    ``load_from_checkpoint`` of the plain class reads it, through the module's own hooks.
    """
    kept = {key: value for key, value in checkpoint.items() if key not in _OF_TRAINING}
    plain: dict[str, Any] = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.0.0"} | kept
    plain["state_dict"] = model.state_dict()
    if is_lightning_module(model):
        module = cast(LightningModule, model)
        if "hyper_parameters" not in plain and module.hparams:
            plain["hyper_parameters"], plain["hparams_name"] = dict(module.hparams), hparams_name(module)
        try:
            module.on_save_checkpoint(plain)
        except Exception:  # of a hook that asks the Trainer something: then the weights have the names of the module
            plain["state_dict"] = model.state_dict()
    return plain


def load_plain(path: Path, model: nn.Module, build: Callable[[], nn.Module] | None) -> nn.Module:
    """Load a checkpoint as its readers will.

    Args:
        path: Of the file.
        model: The one that was written.
        build: Makes a fresh module; by default a copy of ``model`` whose weights and buffers are overwritten first.
    """
    fresh = copy_module(model) if build is None else build()
    if build is None:
        with torch.no_grad():
            for value in fresh.state_dict().values():
                value.fill_(float("nan") if value.is_floating_point() else 0)
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    if build is not None:
        prepare_layers(fresh)
    strict = loading_hooks(fresh, checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"], strict=strict)
    return fresh.eval()


def write_program(model: Forward, inputs: Inputs, path: Path) -> Runner:
    """Write a program of `torch.export` whose first sizes stay open where the model allows it; return how to run it.

    Raises:
        CannotWriteError: If the model can not be traced.
    """
    try:
        with _quiet():
            program = torch.export.export(model, inputs, dynamic_shapes=_any_batch(inputs))
            torch.export.save(program, path)
    except Exception as error:  # whatever tracing may end with
        raise CannotWriteError(_why(model, "torch_export", error)) from error
    module = torch.export.load(path).module()
    return lambda given: module(*given)


def write_onnx(model: Forward, inputs: Inputs, path: Path) -> Runner:
    """Write an ONNX file; it is run by ONNX's reference implementation.

    Raises:
        CannotWriteError: If the packages are missing, or the model can not be translated.
    """
    try:
        import onnxscript  # noqa: F401  # what torch writes with
        from onnx.reference import ReferenceEvaluator
    except ImportError:
        raise CannotWriteError("format=onnx needs onnx: pip install 'lightning-accel[onnx]'.") from None
    shapes = _any_batch(inputs)
    try:
        with _quiet():
            torch.onnx.export(
                model, inputs, path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
            )
        evaluator = ReferenceEvaluator(str(path))
    except Exception as error:  # whatever tracing or translating may end with
        raise CannotWriteError(_why(model, "onnx", error)) from error

    def run(given: Inputs) -> list[Tensor]:
        tensors = [x.numpy() for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
        found = evaluator.run(None, dict(zip(evaluator.input_names, tensors, strict=True)))
        return [torch.as_tensor(x) for x in found]

    return run


def differs_in_batch(inputs: Inputs, other: Inputs) -> bool | None:
    """Whether first sizes differ, all else of the shapes being equal; ``None`` where other sizes do."""
    pairs = list(zip(tensors_in(inputs), tensors_in(other), strict=True))
    if any(a.dim() != b.dim() or a.shape[1:] != b.shape[1:] for a, b in pairs):
        return None
    return any(a.shape != b.shape for a, b in pairs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep tracing from printing graphs and logging guesses: what is wrong is said in one sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _any_batch(inputs: Inputs) -> tuple[Any, ...]:
    auto = torch.export.Dim.AUTO
    return (pytree.tree_map(lambda x: {0: auto} if isinstance(x, Tensor) and x.dim() else None, inputs),)


def _why(model: Forward, file_format: str, error: Exception) -> str:
    name = type(model.model).__name__
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{name} can not be written as {file_format}: {said[:200]} format=checkpoint takes every model."
