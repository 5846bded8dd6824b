"""Projecting the parameters of a model again and again while it trains."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_accel.projection.balls.all_at_once import AllAtOnce
from lightning_accel.projection.balls.exact import ExactState, project_exact
from lightning_accel.projection.balls.floor import Floor
from lightning_accel.projection.balls.norm_pyramid import MaxPyramid, Pyramid, fibre_norms
from lightning_accel.projection.balls.outcome import Cut, LoneCut, NothingNew
from lightning_accel.projection.balls.shared_radius import Team, clear_alone, cut, cut_alone
from lightning_accel.projection.kernels import placement
from lightning_accel.projection.kernels.compiled import Compile, compiling
from lightning_accel.projection.on_device.equal_shapes import cut_equal_shapes, find_equal_shapes
from lightning_accel.projection.on_device.late_norms import LateNorms
from lightning_accel.projection.sharded import gather, scatter
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.held_groups import HeldGroups
from lightning_accel.projection.training.layouts import Layouts
from lightning_accel.projection.training.parameter_state import Memory
from lightning_accel.projection.training.ramp import Ramp
from lightning_accel.projection.training.targets import Target

_ALL = "all parameters"


@dataclass
class Projector:
    """Projects targets in place, step after step.

    Attributes:
        targets: What to project; see `aim_at` for when the model's layers change.
        ball: What to project onto.
        ramp: How much of it after how many steps.
        freeze_zero_groups: Keep groups cleared that a projection has cleared: neither momentum nor gradients bring
            them back.
        compile: As in `project_l1inf`.
        zeros_only: For a target sparsity: clear the groups that the projection clears, leave the others as they are.
        memories: By the targets' names.
        late: Norms on a GPU that `check_finite` has not looked at yet.
    """

    targets: list[Target]
    ball: Ball
    ramp: Ramp = field(default_factory=Ramp)
    freeze_zero_groups: bool = False
    compile: Compile = "auto"
    zeros_only: bool = False
    memories: dict[str, Memory] = field(default_factory=dict)
    late: LateNorms = field(default_factory=LateNorms, repr=False)
    _last: dict[str, Cut | LoneCut | NothingNew] = field(default_factory=dict, repr=False)
    _at_once: dict[tuple[str, int], AllAtOnce] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._layouts = Layouts(self.ball)
        self._held = HeldGroups(self._layouts)
        self._resting: set[str] = set()

    @property
    def last(self) -> dict[str, Cut]:
        """The last `Cut` by target name (of a global budget: by ``"all parameters"``); for logs."""
        return {name: found if isinstance(found, Cut) else found.cut() for name, found in self._last.items()}

    def aim_at(self, targets: list[Target]) -> None:
        """Project these from now on; let go of what others took, such as weights of layers that were exchanged."""
        self.targets = targets
        for target in targets:
            memory = self.memories.get(target.name)
            if memory is not None and not memory.fits(target):  # of a layer of another size in the same place
                del self.memories[target.name]
        self._layouts.forget_all_but(targets)
        self._at_once.clear()
        names = {_ALL, *(target.name for target in targets)}
        self._last = {name: found for name, found in self._last.items() if name in names}
        self.remember_first_norms()

    def rest(self) -> None:
        """Leave alone what is frozen at this moment, until the next call, wherever all targets are projected."""
        self._resting = {t.name for t in self.targets if t.parameter is None or not t.parameter.requires_grad}

    @torch.no_grad()
    def remember_first_norms(self) -> None:
        """Take the norms that `radius_fraction` and a ramp of the radius start from; again is harmless."""
        if self.ball.target_sparsity is not None or (self.ball.radius is not None and self.ramp.end_step is None):
            return
        for target in self.targets:
            memory = self.memory(target)
            if memory.first_norm is None:
                tops = self._layouts.of(target.view(), target).tops()
                memory.first_norm = float(fibre_norms(tops, self.ball.norms[0], (0,)))

    def project(self, step: int, targets: Sequence[Target] | None = None) -> None:
        """Project ``targets`` (by default all; with a global budget always all) as is due after ``step`` steps.

        Raises:
            ValueError: If a parameter holds NaN or infinity and ``nonfinite`` is ``"raise"``; no parameter was changed
                then, unless the method is exact or groups are cleared for a target sparsity, which goes from budget to
                budget. On GPU `check_finite` raises instead, so that steps need not wait.
        """
        chosen = self.targets if targets is None or self.ball.scope == "global" else targets
        if self._resting:
            asked = {target.name for target in targets or ()}
            chosen = [t for t in chosen if t.name in asked or t.name not in self._resting]
        part = self.ramp.at(step)
        if part == 0.0 or not chosen:
            return
        alone = len(chosen) == 1 or (self.zeros_only and self.ball.scope == "parameter")
        with compiling(self.compile):
            left = [t for t in self._project_all(chosen, part) if not (alone and self._project_alone(t, part))]
            for equal, floor in self._of_equal_shapes(left, part):
                self._project_stacked(equal, floor)
                left = [target for target in left if target not in equal]
            if left:
                self._project_together(left, part)

    def _project_all(self, chosen: Sequence[Target], part: float) -> Sequence[Target]:
        """Project plain float32 parameters on CPU in one call of machine code, as nearly every step of a fit can.

        Returns:
            Those that are still to be projected: all, or for a sparsity those of which more groups are to go.
        """
        ball, for_sparsity = self.ball, self.ball.target_sparsity is not None
        if ball.method == "exact" or ball.norms[0] != "l1" or (ball.scope == "global" and len(chosen) > 1):
            return chosen
        if self.freeze_zero_groups != for_sparsity or self.zeros_only != for_sparsity:
            return chosen
        layouts = [self._layouts.known(target) for target in chosen]
        key = chosen[0].name, len(chosen)
        once = self._at_once.get(key)
        if once is None or not once.are(layouts):
            once = AllAtOnce.of(layouts)
        if once is None:
            return self._clear_again(chosen, part) if for_sparsity else chosen
        self._at_once[key] = once
        memories = [self.memory(target) for target in chosen]
        if for_sparsity:
            cleared = [ball.cleared(groups, part) for groups in once.groups]
            gone = once.clear(cleared, [memory.dead for memory in memories])
            if gone is None:
                return self._clear_again(chosen, part)
            taus = [tau for _, tau in gone]
            for memory, (dead, _) in zip(memories, gone, strict=True):
                memory.dead = dead
        else:
            radii = [ball.size(memory.first_norm or 0.0, part) for memory in memories]
            if ball.min_groups > 1 or (ball.min_groups == 1 and min(radii) == 0.0):
                return chosen  # a floor may have to keep some
            found = once.project(radii, [memory.tau for memory in memories])
            if found is None:
                return chosen
            for memory, tau in zip(memories, found, strict=True):
                memory.tau = tau
            taus = found
        for i, (target, tau) in enumerate(zip(chosen, taus, strict=True)):
            self._last[target.name] = LoneCut(once.norms[i], tau, once.left[i])
        return []

    def _clear_again(self, chosen: Sequence[Target], part: float) -> list[Target]:
        """Clear dead groups where no others are to go; return the other targets."""
        left = []
        for target in chosen:
            found = self._held.clear_again(target, self.memory(target).dead, self.ball.cleared(target.num_groups, part))
            if found is None:
                left.append(target)
            else:
                self._last[target.name] = found
        return left

    @torch.no_grad()
    def _project_together(self, chosen: Sequence[Target], part: float) -> None:
        teams = [chosen] if self.ball.scope == "global" else [[target] for target in chosen]
        names = [team[0].name if len(team) == 1 else _ALL for team in teams]
        waits = not any(placement.is_far(t.view()) for t in chosen)
        nonfinite = self.ball.nonfinite if waits else "skip"
        if self.ball.method == "exact":
            cuts = [self._cut_exactly(team, name, part, nonfinite) for team, name in zip(teams, names, strict=True)]
        else:
            cuts = cut(
                [self._team(team, name, part) for team, name in zip(teams, names, strict=True)],
                outer=self.ball.norms[0],
                nonfinite=nonfinite,
            )
            for team, found in zip(teams, cuts, strict=True):
                if len(team) == 1 and not placement.is_far(found.tau):
                    self.memory(team[0]).tau = float(found.tau)
        self._last |= zip(names, cuts, strict=True)
        if not waits and self.ball.nonfinite == "raise":
            self.late.add(cuts)
        for team, found in zip(teams, cuts, strict=True) if self.freeze_zero_groups else ():
            for target, bounds in zip(team, found.bounds, strict=True):
                memory = self.memory(target)
                memory.dead = bounds == 0.0 if memory.dead is None else memory.dead | (bounds == 0.0)

    def _of_equal_shapes(self, targets: Sequence[Target], part: float) -> list[tuple[list[Target], Floor]]:
        """Return parameters on an accelerator that are projected as one tensor, with the floor that they share."""
        ball = self.ball
        plain = ball.method == "bilevel" and ball.norms == ("l1", "linf") and ball.dims is None
        if not plain or ball.scope == "global" or len(targets) < 2 or not placement.is_far(targets[0].view()):
            return []
        return find_equal_shapes(targets, lambda target: self._floor([target], part))

    @torch.no_grad()
    def _project_stacked(self, targets: Sequence[Target], floor: Floor) -> None:
        dead = [self.memory(t).dead for t in targets] if self.freeze_zero_groups else []
        cuts, cleared = cut_equal_shapes(targets, floor, dead)
        self._last |= zip((t.name for t in targets), cuts, strict=True)
        if self.ball.nonfinite == "raise":
            self.late.add(cuts)
        if self.freeze_zero_groups:
            for target, row in zip(targets, cleared.unbind(0), strict=True):
                self.memory(target).dead = row

    def _project_alone(self, target: Target, part: float) -> bool:
        """Take the short way where one plain parameter on CPU is all there is to project; say whether it was."""
        ball, clears = self.ball, self.zeros_only and self.ball.target_sparsity is not None
        if (self.freeze_zero_groups and not clears) or ball.method == "exact" or ball.norms[0] != "l1":
            return False
        whole: Pyramid | None = self._layouts.known(target)
        if whole is None:
            x = target.view()
            if placement.is_far(x) or (isinstance(x, DTensor) and not clears):
                return False
            whole = self._layouts.of(x, target)
        elif isinstance(whole, MaxPyramid) and placement.is_far(whole.blocks.source):
            return False
        memory, floor = self.memory(target), self._floor([target], part)
        if clears:
            dead = memory.dead if self.freeze_zero_groups else None
            found = clear_alone(whole, floor, dead=dead, nonfinite=ball.nonfinite, name=target.name)
            self._last[target.name] = found
            if self.freeze_zero_groups:
                memory.dead = found.left == 0.0 if dead is None else dead | (found.left == 0.0)
            return True
        sparse = ball.target_sparsity is not None
        size: float | Callable[[Tensor], float] = (lambda norms: float(floor.radii(norms))) if sparse else floor.radius
        found = cut_alone(whole, size, start=memory.tau, nonfinite=ball.nonfinite, name=target.name, floor=floor)
        self._last[target.name], memory.tau = found, found.tau
        return True

    @torch.no_grad()
    def hold(self, targets: Sequence[Target] | None = None) -> None:
        """Clear what a mask or a frozen group keeps cleared, after an optimizer step without a projection."""
        with compiling(self.compile):
            for target in self.targets if targets is None else targets:
                self._held.hold(target, self.memory(target))

    @torch.no_grad()
    def mask(self) -> None:
        """Remember which entries are not zero now; from here on `hold` clears all others."""
        for target in self.targets:
            if target.parameter is not None:
                self.memory(target).kept = target.parameter.detach() != 0

    @torch.no_grad()
    def thin_out(self, targets: Sequence[Target]) -> None:
        """Project an average of the targets to as many zero groups as the targets were last given.

        The average of feasible tensors is feasible, but its groups are zero only where they always were. ``targets``
        are those of a copy of the model, or the targets themselves after the average was written over them.
        """
        for target in targets:
            sparsity = self.zero_groups(target.name)
            if sparsity > 0.0 and self.ball.norms[0] == "l1":
                free = replace(self.ball, scope="parameter", min_groups=0)
                ball = replace(free, radius=None, radius_fraction=None, target_sparsity=sparsity)
                Projector([target], ball, compile=self.compile, zeros_only=self.zeros_only).project(1)

    def zero_groups(self, name: str) -> float:
        """Return the fraction of a target's groups that the last projection left at zero."""
        last = self.last
        found, place = last.get(name), 0
        if found is None and _ALL in last:
            names = [t.name for t in self.targets]
            found, place = (last[_ALL], names.index(name)) if name in names else (None, 0)
        if found is None or place >= len(found.bounds):
            return 0.0
        return float((torch.minimum(found.bounds[place], found.tops[place]) == 0.0).double().mean())

    def check_finite(self, *, wait: bool = True) -> None:
        """Look at the norms that were found on a GPU since the last call; without waiting, at those that have come.

        Raises:
            ValueError: If one of them was NaN or infinite; the parameter was left as it was.
        """
        self.late.check(wait=wait)

    def memory(self, target: Target) -> Memory:
        """Return what is known of ``target``."""
        known = self.memories.get(target.name)
        if known is None:
            known = self.memories[target.name] = Memory()
        return known

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next projections depend on, on CPU."""
        return {name: memory.state_dict() for name, memory in self.memories.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was called."""
        devices = {t.name: t.view().device for t in self.targets}
        self.memories = {name: Memory.of(saved, devices.get(name)) for name, saved in state.items()}

    def _team(self, targets: Sequence[Target], name: str, part: float) -> Team:
        dead = [self.memory(t).dead for t in targets] if self.freeze_zero_groups else []
        pyramids = [self._layouts.of(t.view(), t) for t in targets]
        start = self.memory(targets[0]).tau if len(targets) == 1 else 0.0
        floor = self._floor(targets, part)
        return Team(pyramids, functools.partial(_radius, floor), dead, name, start, floor)

    def _floor(self, targets: Sequence[Target], part: float) -> Floor:
        first = math.fsum(self.memory(t).first_norm or 0.0 for t in targets)
        return self.ball.floor([t.num_groups for t in targets], first, part, zeros_only=self.zeros_only)

    def _cut_exactly(self, targets: Sequence[Target], name: str, part: float, nonfinite: str) -> Cut:
        whole = [gather(t.view()) for t in targets]
        dims = [t.group_dims for t in targets]
        dead = [self.memory(t).dead for t in targets] if self.freeze_zero_groups else []
        floor = self._floor(targets, part)
        radius: Tensor | Callable[[Tensor], Tensor] = floor.tau
        if self.ball.target_sparsity is None:
            radius = _radius(floor, whole[0])
        starts = [self.memory(t).mu for t in targets]
        state = ExactState(torch.cat([s for s in starts if s is not None]) if None not in starts else None)
        parts = [(x, d, x) for x, d in zip(whole, dims, strict=True)]
        found = project_exact(parts, radius, nonfinite=nonfinite, state=state, dead=dead, name=name, floor=floor)
        for x, target, bounds in zip(whole, targets, found.bounds, strict=True):
            scatter(x, target.view())
            self.memory(target).mu = None if state.mu is None else bounds
        return found


def _radius(floor: Floor, norms: Tensor) -> Tensor:
    """Return the radius, float64 ``(1,)``, for norms of groups; without a host synchronization."""
    return floor.radii(norms.flatten()).reshape(1)
