"""How sparse parameters are, as a torchmetrics metric."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_accel.projection.kernels.layout import normalize_dims


class GroupSparsity(Metric):
    """Count groups and entries that are zero, over all tensors it was updated with.

    `compute` returns the fractions ``zero_groups`` and ``zero_entries``, in [0, 1]; both 0 before the first update.
    Every process holds the same parameters, so nothing is summed over processes.

    Args:
        group_dims: Dimensions that number the groups, for `update` calls that give none.

    Example:
        >>> import torch
        >>> from lightning_accel.callbacks import GroupSparsity
        >>> metric = GroupSparsity(group_dims=(0,))
        >>> metric.update(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        >>> float(metric.compute()["zero_groups"])
        0.5
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    counts: Tensor

    def __init__(self, group_dims: Sequence[int] = (0,)) -> None:
        super().__init__(sync_on_compute=False)
        self.group_dims = tuple(group_dims)
        # zero groups, groups, zero entries, entries; float64 counts exactly up to 2**53
        self.add_state("counts", default=torch.zeros(4, dtype=torch.float64), dist_reduce_fx=None)

    @torch.no_grad()
    def update(self, tensor: Tensor, group_dims: Sequence[int] | None = None) -> None:
        """Count the zeros of ``tensor``.

        Raises:
            ValueError: If ``group_dims`` are not dimensions of ``tensor``.
        """
        self.counts += count_zeros(tensor, self.group_dims if group_dims is None else group_dims).to(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """Return the fractions of zero groups and zero entries."""
        return zero_fractions(self.counts)


def count_zeros(tensor: Tensor, group_dims: Sequence[int]) -> Tensor:
    """Return zero groups, groups, zero entries and entries of a tensor, float64 ``(4,)``.

    Raises:
        ValueError: If ``group_dims`` are not dimensions of ``tensor``.
    """
    dims = normalize_dims(group_dims, tensor.ndim)
    rest = tuple(d for d in range(tensor.ndim) if d not in dims)
    alive = tensor != 0
    groups = alive.any(dim=rest) if rest else alive
    found = torch.stack(((~groups).sum(), (~alive).sum())).double()
    return torch.stack((found[0], found.new_tensor(groups.numel()), found[1], found.new_tensor(alive.numel())))


def zero_fractions(counts: Tensor) -> dict[str, Tensor]:
    """Return the fractions of zero groups and zero entries, from what `count_zeros` returned, summed or not."""
    zero_groups, groups, zero_entries, entries = counts.unbind(-1)
    return {"zero_groups": zero_groups / groups.clamp_min(1), "zero_entries": zero_entries / entries.clamp_min(1)}
