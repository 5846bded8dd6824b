"""Which of the parameters that were asked for are projected now: trained ones, of hidden layers, with a choice."""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_accel.callbacks.projection.selection import Selection, too_few_groups, without_projection
from lightning_accel.lightning_private import has_compiled_parts
from lightning_accel.lightning_private.decision_line import say_decision
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.output_layers import OutputLayers, has_matrices
from lightning_accel.projection.training.targets import Target

_log = logging.getLogger("lightning_accel.callbacks.projection")
_OUTPUT = "writes the model's output"
_UNUSED = "took no part in the steps of its first epoch"
_FIRST, _PERIOD = 16, 13  # steps of an epoch: all that are looked at, then one of a number that no habit divides
_SHOWN = 12  # names in a message


class LayerRoles:
    """Sorts parameters by what they are to the model, as far as that is known, and says so once it has changed.

    Without patterns only hidden layers are projected, and which they are shows in the first backward pass; until a
    parameter has been sorted out it is left alone. Layers that are thawed later, and lazy ones that get their shapes,
    join.

    Args:
        callback: Name of the callback's class, for messages.
        selection: What was asked for.
        ball: Says how many groups stay.

    Attributes:
        candidates: What was asked for and is trained.
        waiting: What was asked for and is not trained now.
        lazy: Names of what has no shape yet.
        alone: What was asked for and is left alone all the same, with the reason.
    """

    def __init__(self, callback: str, selection: Selection, ball: Ball) -> None:
        self.callback, self.selection, self.ball = callback, selection, ball
        # an infinite radius changes nothing, so there is nothing to find out
        self._sorts = selection.hidden_only and ball.radius != float("inf")
        self.forget(None)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run."""
        return {"callback": self.callback, "selection": self.selection, "ball": self.ball}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin anew."""
        LayerRoles.__init__(self, **state)

    def forget(self, state: dict[str, bool] | None) -> None:
        """Begin a run, with what `state_dict` returned in an interrupted one."""
        self.candidates: list[Target] = []
        self.waiting: list[Target] = []
        self.lazy: list[str] = []
        self.alone: dict[str, str] = {}
        self._waiting_state: list[int] = []
        self._writes_output = dict(state or {})
        self._trained: dict[int, tuple[set[nn.Module], list[Target]]] = {}
        self._owned: dict[int, list[Target]] = {}
        self._watch: OutputLayers | None = None
        self._eagerly: contextlib.AbstractContextManager[Any] | None = None
        self._last_epoch: int | None = None
        self._compiled_batches, self._closed = 1, False
        self._said: tuple[list[str], list[str]] | None = None

    def state_dict(self) -> dict[str, bool]:
        """Return what was found out: of each name whether its layer writes the output."""
        return dict(self._writes_output)

    @property
    def are_open(self) -> bool:
        """Whether the graph of the step that is going on is to be looked at."""
        return self._watch is not None or bool(self.lazy)

    def trains(self, index: int) -> bool:
        """Say whether an optimizer trains something that was asked for."""
        return bool(self._trained.get(index, (set(), []))[1])

    def owned_by(self, index: int) -> list[Target]:
        """Return what to project after a step of an optimizer: what it can move."""
        mine = self._owned.get(index, [])
        return [t for t in mine if t.parameter is not None and t.parameter.requires_grad]

    def have_changed(self, trainer: "pl.Trainer") -> bool:
        """Say whether something that was not trained may be so now: it was thawed, or an optimizer got more groups."""
        return bool(self.waiting) and self._state_of_waiting(trainer) != self._waiting_state

    def _state_of_waiting(self, trainer: "pl.Trainer") -> list[int]:
        thawed = [t.parameter is not None and t.parameter.requires_grad for t in self.waiting]
        return [*thawed, *(len(optimizer.param_groups) for optimizer in trainer.optimizers)]

    def resolve(self, trainer: "pl.Trainer", module: nn.Module) -> list[Target]:
        """Find everything anew; return what to project now."""
        found = self.selection.find(module)
        self.lazy = self.selection.find_lazy(module)
        self._trained = {}
        for index, optimizer in enumerate(trainer.optimizers):
            ids = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
            modules = {
                m for m in module.modules() if has_matrices(m) and any(id(p) in ids for p in m._parameters.values())
            }
            self._trained[index] = modules, [t for t in found if id(t.parameter) in ids]
        trained = {id(t) for _, mine in self._trained.values() for t in mine}
        self.candidates = [t for t in found if id(t) in trained]
        self.waiting = [t for t in found if id(t) not in trained]
        self._waiting_state = self._state_of_waiting(trainer)
        # known at the next step only: a resumed fit gets its epoch after it has started
        self._last_epoch, self._closed = None, False
        return self._sort(trainer)

    def look(self, trainer: "pl.Trainer", module: nn.Module) -> None:
        """Watch the step that begins, where something has not been sorted out; of compiled models one step a change.

        Watching makes a step of a small model half as long again, and a layer that is never called is never sorted out:
        so of a long epoch all first steps are watched, and few of the others.
        """
        self.look_away()
        if self._closed or not self._unsorted():
            return
        if self._last_epoch is None:
            self._last_epoch = trainer.current_epoch
        if trainer.current_epoch > self._last_epoch:
            self.close(trainer)
            return
        batch = trainer.fit_loop.batch_idx
        if batch >= _FIRST and batch % _PERIOD:
            return
        if has_compiled_parts(module):  # one node would stand for all layers: this step runs as it is written
            if self._compiled_batches == 0:
                return
            self._compiled_batches -= 1
            self._eagerly = torch.compiler.set_stance("force_eager")
            self._eagerly.__enter__()
        self._watch = OutputLayers(module)

    def close(self, trainer: "pl.Trainer") -> None:
        """Look no more, and leave alone what took no part in the steps that were looked at."""
        if self._unsorted() and not self._closed:
            self._closed = True
            self._sort(trainer)

    def look_away(self) -> None:
        """End watching."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        if self._eagerly is not None:
            self._eagerly.__exit__(None, None, None)
            self._eagerly = None

    def sort_out(self, trainer: "pl.Trainer", module: nn.Module, loss: Tensor | None) -> list[Target]:
        """Look at the graph of a step, from its loss if that is known; return what to project now."""
        if self.lazy:
            self.resolve(trainer, module)
        if self._watch is not None:
            if loss is not None:
                self._watch.note_loss(loss)
            for name, writes in self._watch.sort_out(self._trained.values()).items():
                self._writes_output[name] = writes or self._writes_output.get(name, False)
        return self._sort(trainer)

    def adopt(self, watch: OutputLayers) -> None:
        """Take what somebody else has seen of a step."""
        self._watch = watch

    def _unsorted(self) -> list[Target]:
        return [t for t in self.candidates if t.name not in self._writes_output] if self._sorts else []

    def _sort(self, trainer: "pl.Trainer") -> list[Target]:
        alone: dict[str, str] = {}
        for target in self.candidates:
            reason = too_few_groups(target, self.ball, hidden_only=self.selection.hidden_only)
            if self._sorts and self._writes_output.get(target.name):
                reason = _OUTPUT
            reason = without_projection(target, self.ball) or reason
            if reason is not None:
                alone[target.name] = reason
        unsorted = {t.name for t in self._unsorted()}
        if self._closed:
            alone |= dict.fromkeys(sorted(unsorted), _UNUSED)
            unsorted = set()
        self.alone = alone
        chosen = [t for t in self.candidates if t.name not in alone and t.name not in unsorted]
        names = {t.name for t in chosen}
        self._owned = {i: [t for t in mine if t.name in names] for i, (_, mine) in self._trained.items()}
        self._say(trainer, chosen, alone, unsorted)
        return chosen

    def _say(self, trainer: "pl.Trainer", chosen: Sequence[Target], alone: dict[str, str], unsorted: set[str]) -> None:
        """Say what is projected, and what is not and why, where that is news and nothing is open."""
        frozen = {t.name: "is not trained now; it joins when it is" for t in self.waiting}
        missing = self.selection.without_match([*self.candidates, *self.waiting])
        news = [t.name for t in chosen], sorted(alone | frozen)
        if unsorted - set(alone) or self.lazy or news == self._said or not trainer.is_global_zero:
            return
        before, self._said = self._said, news
        if not (chosen or alone or frozen) and (before is None or not before[0]):
            return
        projects = _listed(news[0]) if chosen else "nothing any more" if before and before[0] else "nothing"
        left = _listed([f"{name} ({why})" for name, why in (alone | frozen).items()])
        text = f"{self.callback} projects {projects}." + (f" It leaves alone {left}." if left else "")
        if missing and (chosen or alone or frozen):
            text += f" No parameter fits {', '.join(map(repr, missing))}."
        unexpected = bool(missing) or (bool(alone or frozen) if not self.selection.hidden_only else not chosen)
        if not chosen and before is not None and before[0]:  # another callback has taken the layers over
            unexpected = False
        if unexpected and self.selection.hidden_only:
            text += " Name parameters in `parameters` to project them all the same."
        if unexpected:
            _log.warning("%s", text)
            return
        say_decision(trainer, self.callback, text.removeprefix(f"{self.callback} "))
        if left:
            _log.info("%s leaves alone %s.", self.callback, left)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
