"""Leading singular vectors of a weight's unfoldings, computed once for a plan and the decomposition that follows it."""

import ctypes
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_ROWS = 128  # of a Gram matrix, in one product


@dataclass
class _Known:
    squares: dict[int, Tensor] = field(default_factory=dict)  # side to all squared singular values, falling
    vectors: dict[int, Tensor] = field(default_factory=dict)  # side to leading vectors, (size, number)
    core: Tensor | None = None  # (r2, r1, *kernel)


class LeadingVectors:
    """Singular values and vectors of a weight's unfoldings, from Gram matrices in float64; each is computed once.

    Sides: 0 is that of the output channels, 1 of the input channels, 2 of input channels and kernel together.

    Args:
        weight: (out, in, *kernel), finite, in float32 or float64. It must not change while this is in use.
    """

    def __init__(self, weight: Tensor, known: _Known | None = None) -> None:
        self._weight, self._known = weight, known or _Known()
        out, fan_in, *kernel = weight.shape
        self._short = 0 if out <= fan_in * math.prod(kernel) else 2 if math.prod(kernel) > 1 else 1

    def prepare(self, ranks: Sequence[Sequence[int]], *, decompose: bool) -> None:
        """Compute at once what the energies at the largest of these ranks need, or what decompositions do."""
        if (largest := _largest(ranks, 1)) and decompose and self._weight.dtype == torch.float32:
            self._vectors(self._short, largest[0])
        if largest := _largest(ranks, 2):
            self.tucker(largest)

    def two_factor_energies(self) -> Tensor:
        """Return the squared norm of what rank 1, 2, ... keep of the weight unfolded to (out, in * kernel)."""
        if self._short not in self._known.squares:
            gram = _lower_gram(self._unfolded(self._short))
            self._known.squares[self._short] = torch.linalg.eigvalsh(gram).flip(0)
        return self._known.squares[self._short].clamp_min(0.0).cumsum(0)

    def tucker_energies(self, ranks: Sequence[int]) -> Tensor:
        """Return the squared norm of what (1, 1), (1, 2), ... up to at least ``ranks`` keep."""
        core = self._known.core
        if core is None or core.shape[0] < ranks[1] or core.shape[1] < ranks[0]:
            _, core, _ = self.tucker(ranks)
        return core.double().square().flatten(2).sum(2).T.cumsum(1).cumsum(0)

    def matrix(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return left singular vectors, singular values (falling) and right ones of the weight as (out, in * kernel).

        The Gram matrix squares singular values, which in float64 leaves those of a float32 exact. Weights in float64
        take an SVD instead.
        """
        matrix = self._weight.flatten(1)
        if matrix.dtype != torch.float32:
            return singular_vectors(matrix, rank)
        short = self._vectors(self._short, rank)
        values = self._known.squares[self._short][:rank].clamp_min(0.0).sqrt()
        wide = self._unfolded(self._short).double()
        long = short.T @ wide / values.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        left, right = (short, long) if self._short == 0 else (long.T, short.T)
        return left.to(matrix.dtype), values.to(matrix.dtype), right.to(matrix.dtype)

    def tucker(self, ranks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return leading vectors of the output side (out, r2), the core (r2, r1, *kernel), those of the input side."""
        left = self._vectors(0, ranks[1]).to(self._weight.dtype)
        right = self._vectors(1, ranks[0]).to(self._weight.dtype)
        core = self._known.core
        # a part of a larger core would be rounded otherwise than one by itself
        if core is None or core.shape[:2] != (left.shape[1], right.shape[1]):
            core = self._known.core = torch.einsum("ob,oi...,ia->ba...", left, self._weight, right)
        return left, core, right

    def cut(self, ranks: Sequence[Sequence[int]]) -> _Known:
        """Return what is known, without what no decomposition into any of these ranks needs."""
        one, two = _largest(ranks, 1), _largest(ranks, 2)
        sizes = {0: two[1], 1: two[0]} if two else {}
        if one:
            sizes[self._short] = max(one[0], sizes.get(self._short, 0))
        vectors = {side: v[:, : sizes[side]].clone() for side, v in self._known.vectors.items() if side in sizes}
        return dataclasses.replace(self._known, vectors=vectors)

    def _vectors(self, side: int, number: int) -> Tensor:
        """Return the leading vectors of a side in float64, all there are where ``number`` exceeds that."""
        known = self._known.vectors.get(side)
        if known is None or known.shape[1] < min(number, known.shape[0]):
            values, vectors = torch.linalg.eigh(_lower_gram(self._unfolded(side)))
            self._known.squares[side], known = values.flip(0), vectors.flip(1)
            self._known.vectors[side] = known
        return known[:, :number]

    def _unfolded(self, side: int) -> Tensor:
        if side == 1:
            return self._weight.transpose(0, 1).flatten(1)
        return self._weight.flatten(1) if side == 0 else self._weight.flatten(1).T


class SharedVectors:
    """Hands the singular vectors that `make_plan` finds on to `decompose`, which then does not compute them again.

    They are found again by the values of the weight alone: one that has changed since is decomposed anew. Vectors are
    kept as long as this object is, as many as the largest ranks need that the plan considered.

    Example:
        >>> from torch import nn
        >>> from lightning_accel.low_rank import SharedVectors, decompose, make_plan
        >>> model, shared = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), SharedVectors()
        >>> plan = make_plan(model, None, ratio=2.0, method="snapped", shared=shared)
        >>> list(decompose(model, plan, shared=shared))
        ['0', '2']
    """

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def keep(self, digest: str, vectors: LeadingVectors, ranks: Sequence[Sequence[int]]) -> None:
        """Keep what decompositions of a weight, known by its `weight_digest`, into any of these ranks need."""
        self._known[digest] = vectors.cut(ranks)

    def of(self, weight: Tensor, precise: Tensor) -> LeadingVectors:
        """Return the vectors of a weight, of which ``precise`` is a copy in float32 or better."""
        return LeadingVectors(precise, self._known.get(weight_digest(weight)) if self._known else None)


def weight_digest(weight: Tensor) -> str:
    """Return a hash of the weight's type, shape and bytes (torch alone can not hand out bytes without copying)."""
    data = weight.detach().cpu().contiguous()
    size = data.numel() * data.element_size()
    digest = hashlib.blake2b(f"{data.dtype}{tuple(data.shape)}".encode(), digest_size=16)
    digest.update((ctypes.c_char * size).from_address(data.data_ptr()))
    return digest.hexdigest()


def singular_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading left singular vectors, singular values (falling) and right ones, by an SVD."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def _largest(ranks: Sequence[Sequence[int]], form: int) -> tuple[int, ...]:
    """Return the largest of each rank among those of one form; () if there is none."""
    return tuple(map(max, zip(*(r for r in ranks if len(r) == form), strict=True)))


def _lower_gram(rows: Tensor) -> Tensor:
    """Return ``rows @ rows.T`` in float64, zeros in most of the upper triangle: `torch.linalg.eigh` reads the lower."""
    rows = rows.double()
    gram = rows.new_zeros(rows.shape[0], rows.shape[0])
    for start in range(0, rows.shape[0], _ROWS):
        stop = start + _ROWS
        torch.mm(rows[start:stop], rows[:stop].T, out=gram[start:stop, :stop])
    return gram
