"""Compare one whole training step of the user's module, computed with schedules, with the plain one; on copies."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_accel.callbacks.layer_exchange.step_trial import StepTrial
from lightning_accel.callbacks.recurrent.manual_step import manual_step
from lightning_accel.torch_private import own_attributes

STEPS = 2  # what a comparison takes, in training steps without the optimizer's part
_CLOSE = {torch.float64: 1e-8, torch.float32: 1e-3}  # relative; halves below
_CLOSE_OF_HALVES = 3e-2
_DEEP = 4  # how far lists and dictionaries of attributes are looked into
_OF_LIGHTNING = frozenset(own_attributes(pl.LightningModule())) | {"log", "log_dict", "trainer"}

Scheduled = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass
class _Outcome:
    """What a training step leaves: its loss, gradients by parameter, and what it logged and noted, by name."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    noted: dict[str, float | Tensor]


def difference(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int, scheduled: Scheduled
) -> str | None:
    """Say what a training step with schedules computes differently; ``None`` if loss and all gradients are the same.

    Both steps start from the same weights, batch and random state, and nothing of them is left behind: they run on
    private copies whose logging is silent. What a step logs and notes in attributes is compared as well.

    Args:
        trainer: Of the run.
        pl_module: Its module, copied; with manual optimization, the gradients of every update count.
        batch: As ``training_step`` gets it.
        batch_idx: As ``training_step`` gets it.
        scheduled: Gives a copy its schedules for the time of a step.
    """
    run = _Runner(trainer, pl_module, batch, batch_idx)
    try:
        plain = run(lambda _: nullcontext())
    except Exception as error:
        return f"a training step can not be tried on a copy of the module: {_said(error)}"
    try:
        other = run(scheduled)
    except Exception as error:
        return f"a training step fails with it: {_said(error)}"
    tolerance = _tolerance(pl_module)
    try:
        found = next(_differences(plain, other, tolerance), None)
        if found is None:
            return None
        again = run(lambda _: nullcontext())
        unstable = set(_different_names(plain, again, tolerance))
        found = next((text for name, text in _named(plain, other, tolerance) if name not in unstable), None)
    except Exception as error:  # of kinds of tensors that can not be subtracted
        return f"what a training step leaves can not be compared: {_said(error)}"
    if "the loss" in unstable or any(name.startswith("the gradient") for name in unstable):
        return "a training step does not repeat itself on the same batch and random state, so it can not be compared"
    return found


class _Runner:
    def __init__(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int) -> None:
        self._arguments = trainer, pl_module, batch, batch_idx

    def __call__(self, scheduled: Scheduled) -> _Outcome:
        error: Exception | None = None
        with isolate_rng():  # which restores nothing after an exception
            try:
                outcome = self._step(scheduled)
            except Exception as raised:
                error = raised
        if error is not None:
            raise error
        return outcome

    def _step(self, scheduled: Scheduled) -> _Outcome:
        trial = StepTrial(*self._arguments)
        logged: dict[str, float | Tensor] = {}
        for module in trial.module.modules():
            if "log" in module.__dict__:
                module.__dict__.update(log=_noting(logged), log_dict=_noting_all(logged))
        gradients: dict[str, Tensor | None]
        with scheduled(trial.module):
            if trial.module.automatic_optimization:
                loss = trial.forward()
                trial.module.backward(loss)
                gradients = {name: p.grad for name, p in trial.module.named_parameters()}
            else:
                loss, gradients = torch.zeros(()), manual_step(trial, self._arguments[0])
        return _Outcome(loss.detach(), gradients, {**logged, **dict(_noted(trial.module))})


def _noting(logged: dict[str, float | Tensor]) -> Callable[..., None]:
    def log(name: str, value: Any, *_: Any, **__: Any) -> None:
        if isinstance(value, (int, float, Tensor)):
            logged[f"what is logged as `{name}`"] = value.detach().clone() if isinstance(value, Tensor) else value

    return log


def _noting_all(logged: dict[str, float | Tensor]) -> Callable[..., None]:
    def log_dict(values: Any, *_: Any, **__: Any) -> None:
        for name, value in dict(values).items():
            _noting(logged)(name, value)

    return log_dict


def _noted(root: nn.Module) -> Iterator[tuple[str, float | Tensor]]:
    for prefix, module in root.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, buffer in module.named_buffers(recurse=False):
            yield f"buffer `{dot}{name}`", buffer.detach()
        for name, value in own_attributes(module).items():
            if name not in _OF_LIGHTNING and name != "forward":
                yield from _numbers(f"attribute `{dot}{name}`", value, _DEEP)


def _numbers(name: str, value: Any, depth: int) -> Iterator[tuple[str, float | Tensor]]:
    if isinstance(value, (int, float)):
        yield name, value
    elif isinstance(value, Tensor):
        yield name, value.detach()
    elif depth and isinstance(value, (list, tuple)):
        for k, part in enumerate(value):
            yield from _numbers(f"{name}[{k}]", part, depth - 1)
    elif depth and isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(f"{name}[{key!r}]", part, depth - 1)


def _differences(plain: _Outcome, other: _Outcome, tolerance: float) -> Iterator[str]:
    return (text for _, text in _named(plain, other, tolerance))


def _different_names(plain: _Outcome, other: _Outcome, tolerance: float) -> Iterator[str]:
    return (name for name, _ in _named(plain, other, tolerance))


def _named(plain: _Outcome, other: _Outcome, tolerance: float) -> Iterator[tuple[str, str]]:
    if (off := _off(plain.loss, other.loss)) > tolerance:
        yield "the loss", f"the loss of a whole training step differs by {off:.1e} of itself"
    norms = [float(g.detach().double().norm()) for g in plain.gradients.values() if g is not None]
    whole = math.sqrt(sum(n * n for n in norms if math.isfinite(n)))
    for parameter, gradient in plain.gradients.items():
        found, name = other.gradients.get(parameter), f"the gradient of `{parameter}`"
        if (gradient is None) != (found is None):
            yield name, f"{name} is {'None' if found is None else 'there'}, and not in the plain step"
        elif gradient is not None and found is not None:
            off = _off(gradient, found, floor=tolerance * whole)
            if off > tolerance:
                yield name, f"{name} in a whole training step differs by {off:.1e} of itself"
    for name, value in plain.noted.items():
        if name not in other.noted:
            yield name, f"{name} is missing after a training step"
        elif (off := _off(_as_tensor(value), _as_tensor(other.noted[name]))) > 10 * tolerance:
            yield name, f"{name} differs by {off:.1e} of itself after a training step"
    for name in other.noted.keys() - plain.noted.keys():
        yield name, f"{name} is new after a training step"


def _off(plain: Tensor, other: Tensor, *, floor: float = 1e-12) -> float:
    """Return the norm of the difference over that of ``plain``; infinite for other shapes or other NaNs."""
    if plain.shape != other.shape or plain.dtype != other.dtype:
        return math.inf
    if plain.is_sparse or other.is_sparse:
        plain, other = plain.to_dense(), other.to_dense()
    a, b = plain.double() if not plain.is_complex() else plain, other.double() if not other.is_complex() else other
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    gap = torch.where(same, torch.zeros_like(a), a - b)
    a = torch.where(a.isfinite(), a, torch.zeros_like(a))
    off = float(gap.abs().square().sum().sqrt()) / max(float(a.abs().square().sum().sqrt()), floor, 1e-12)
    return off if math.isfinite(off) else math.inf


def _as_tensor(value: float | Tensor) -> Tensor:
    """Return a number as a tensor; of integers beyond 64 bits (seeds, identifiers) the low ones."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value %= 2**63
    return torch.as_tensor(value)


def _tolerance(module: nn.Module) -> float:
    return max((_CLOSE.get(p.dtype, _CLOSE_OF_HALVES) for p in module.parameters()), default=_CLOSE_OF_HALVES)


def _said(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'without a message'}"
