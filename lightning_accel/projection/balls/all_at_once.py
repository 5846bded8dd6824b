"""Projections of the same tensors, in place and step after step, in one call of machine code for all of them.

Between the operations of a training step, whose code and data fill the caches, all that is done for a tensor beside its
passes over memory takes 40 us and more: addresses, memory for results, checks. Here it is done once for many steps.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.projection.balls.l1_thresholds import near_limits
from lightning_accel.projection.balls.norm_pyramid import MaxPyramid
from lightning_accel.projection.kernels import compiled
from lightning_accel.projection.kernels.rounding import EPSILON, KEEP_FLOAT


class _Ball(ctypes.Structure):
    """``ball_t`` of `c_thresholds`."""

    _fields_ = [(name, ctypes.c_double) for name in ("radius", "target", "enough", "rounding", "low", "slack")]


class _Part(ctypes.Structure):
    """``part_t`` of `c_thresholds`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "norms", "kept", "memory", "dead")),
        *((name, ctypes.c_int64) for name in ("before", "groups", "after", "threads", "found", "cleared", "fresh")),
        ("ball", _Ball),
        ("shift", ctypes.c_double),
    ]


class AllAtOnce:
    """Parameters that are projected together, each onto a ball of its own; all of them or none.

    Attributes:
        layouts: Of the parameters, as they lie in memory.
        groups: How many each has.
        norms: Norms of their groups before the last projection, float64 ``(groups,)`` each; the next one writes here.
        left: What it left of them, alike; infinite where it left a parameter alone.
    """

    def __init__(self, layouts: Sequence[MaxPyramid]) -> None:
        self.layouts = list(layouts)
        self._sources = [layout.blocks.source for layout in layouts]
        self.groups = [x.shape[1] for x in self._sources]
        memory = torch.empty(4, sum(self.groups), dtype=torch.float64, device="cpu")
        self.norms, self.left = (list(row.split(self.groups)) for row in memory[:2])
        self._memory = memory[2:].flatten().split([2 * n for n in self.groups])
        self._radii: list[float] = []
        self._masks = torch.zeros(sum(self.groups), dtype=torch.bool, device="cpu").split(self.groups)
        self._dead: list[Tensor | None] = [None] * len(self.groups)
        self._threads = 0
        items = (_Part * len(layouts))()
        self._parts = [items[i] for i in range(len(layouts))]
        self._items, self._address = items, ctypes.addressof(items)
        rows = zip(self._parts, self._sources, self.norms, self.left, self._memory, self._masks, strict=True)
        for part, x, *addresses in rows:
            part.x, (part.before, part.groups, part.after) = x.data_ptr(), x.shape
            part.norms, part.kept, part.memory, part.dead = (row.data_ptr() for row in addresses)

    @classmethod
    def of(cls, layouts: Sequence[MaxPyramid | None]) -> "AllAtOnce | None":
        """Return what projects parameters together; ``None`` where it takes more than float32 in place on CPU."""
        known = [layout for layout in layouts if layout is not None and layout.is_plain(torch.float32)]
        return cls(known) if known and len(known) == len(layouts) else None

    def are(self, layouts: Sequence[MaxPyramid | None]) -> bool:
        """Say whether these are the layouts that it was made for."""
        return len(layouts) == len(self.layouts) and all(a is b for a, b in zip(layouts, self.layouts, strict=True))

    def project(self, radii: Sequence[float], starts: Sequence[float]) -> list[float] | None:
        """Project each parameter onto the ball of its radius; norms are largest magnitudes, and add up.

        Args:
            radii: One a parameter, >= 0.
            starts: The thresholds of similar tensors, or 0.

        Returns:
            What was taken off each norm, 0 where nothing was done; ``None`` where one parameter takes a more careful
            look, or there is no machine code: nothing was written then.
        """
        library = compiled.library_for_floats()
        if library is None:
            return None
        if self._radii != radii:
            self._radii = list(radii)
            for part, radius in zip(self._parts, radii, strict=True):
                target, low, slack = near_limits(part.groups, radius, part.groups)
                rounding = EPSILON * part.groups
                part.ball = _Ball(radius, target, target * (1.0 + rounding), rounding, low, slack)
        for part, start in zip(self._parts, starts, strict=True):
            part.shift = start
        self._share_threads()
        if not library.project_parts(self._address, len(self._parts), KEEP_FLOAT):
            return None
        compiled.tell_autograd(*self._sources)
        return [part.shift for part in self._parts]

    def clear(self, cleared: Sequence[int], dead: Sequence[Tensor | None]) -> list[tuple[Tensor, float]] | None:
        """Clear the smallest groups of each parameter, as `clear_alone` does.

        Args:
            cleared: How many of each are to go, >= 0.
            dead: Boolean ``(groups,)`` a parameter, or ``None`` for none: groups that count as the smallest, and are
                cleared in any case.

        Returns:
            What is dead now, the same tensor as before where nothing has come to it, and the threshold; ``None`` where
            a parameter holds NaN or infinity, or there is no machine code: nothing was written then.
        """
        library = compiled.library_for_floats()
        if library is None:
            return None
        for i, (part, count, mask) in enumerate(zip(self._parts, cleared, dead, strict=True)):
            part.cleared = count
            if mask is not self._dead[i]:
                self._masks[i].copy_(mask) if mask is not None else self._masks[i].zero_()
                self._dead[i] = mask
        self._share_threads()
        if not library.clear_parts(self._address, len(self._parts)):
            return None
        compiled.tell_autograd(*self._sources)
        found = []
        for i, part in enumerate(self._parts):
            mask = self._dead[i]
            if mask is None or part.fresh:
                mask = self._dead[i] = self._masks[i].clone()
            found.append((mask, part.shift))
        return found

    def _share_threads(self) -> None:
        threads = torch.get_num_threads()
        if threads != self._threads:
            self._threads = threads
            for part, x in zip(self._parts, self._sources, strict=True):
                part.threads = compiled.threads_for(x)
