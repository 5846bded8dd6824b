"""What a projection callback watches in a fit: the steps of optimizers, and changes of what they train."""

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_accel.projection.training.targets import Target


class Steps:
    """Sees the steps of all optimizers of a fit.

    They are told by the optimizers' own hooks. Steps that never get there, for a gradient scaler skips them or an
    optimizer of a make of its own takes no hooks, are told once the next one is due, or the batch is over. With manual
    optimization a step may come by another method (SAM's ``second_step``), of which nobody tells: the weights do.

    Args:
        after: Is told the place of the optimizer that has taken a step.
    """

    def __init__(self, after: Callable[["pl.Trainer", int], None]) -> None:
        self._after = after
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a fit."""
        return {"_after": self._after}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin anew."""
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._handles: list[Any] = []
        self._due: set[int] = set()
        self._is_within = False
        self._heard_of: set[int] = set()
        self._versions: dict[int, int] = {}

    def watch(self, trainer: "pl.Trainer") -> None:
        """Watch the optimizers that there are now, and no others."""
        self.stop()
        for index, optimizer in enumerate(trainer.optimizers):
            with contextlib.suppress(AttributeError):
                self._handles.append(optimizer.register_step_pre_hook(self._begin))
                self._handles.append(optimizer.register_step_post_hook(functools.partial(self._end, trainer, index)))

    def stop(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._forget()

    def begin(self, trainer: "pl.Trainer") -> None:
        """Begin a batch."""
        if not trainer.lightning_module.automatic_optimization:
            others = set(range(len(trainer.optimizers))) - self._heard_of
            self._versions = {index: _version(trainer.optimizers[index]) for index in others}

    def expect(self, trainer: "pl.Trainer", optimizer: torch.optim.Optimizer) -> None:
        """Note that gradients are there for a step; an optimizer may ask for them several times within one."""
        if self._is_within:
            return
        index = [id(other) for other in trainer.optimizers].index(id(optimizer))
        self._heard_of.add(index)
        if index in self._due:  # several steps a batch, by hand
            self._after(trainer, index)
        self._due.add(index)

    def settle(self, trainer: "pl.Trainer") -> None:
        """Tell of the steps that were due and that nobody has told."""
        for index in sorted(self._due):
            self._after(trainer, index)
        self._due.clear()
        for index, optimizer in enumerate(trainer.optimizers):
            known = None if index in self._heard_of else self._versions.get(index)
            if known is not None and _version(optimizer) != known:
                self._after(trainer, index)

    def _begin(self, *_: Any) -> None:
        self._is_within = True

    def _end(self, trainer: "pl.Trainer", index: int, *_: Any) -> None:
        self._is_within = False
        self._due.discard(index)
        self._heard_of.add(index)
        self._after(trainer, index)


def _version(optimizer: torch.optim.Optimizer) -> int:
    return sum(parameter._version for group in optimizer.param_groups for parameter in group["params"])


class Changes:
    """Notices that a fit trains other parameters, or by other optimizers, than when it was asked last."""

    def __init__(self) -> None:
        self._seen: object = None

    def have_come(self, trainer: "pl.Trainer", targets: Iterable[Target]) -> bool:
        """Say whether something has changed since the last call; the first one says no."""
        now = (
            [(name, id(parameter)) for name, parameter in trainer.lightning_module.named_parameters()],
            [id(optimizer) for optimizer in trainer.optimizers],
        )
        before, self._seen = self._seen, now
        return before is not None and (before != now or any(target.is_gone for target in targets))
