"""The gradient of a dense weight, as far as the gradients of its factors tell."""

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def dense_gradient(values: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> Tensor | None:
    """Return a gradient of the dense weight that gives the factors theirs; None where no factor has one.

    With ``W = U V`` and ``G`` the gradient of ``W``, the factors have ``G V^T`` and ``U^T G``. The smallest matrix with
    these products is the part of ``G`` along which the factors can move ``W``; the rest is never computed. A chain of
    three factors is taken as a product of two twice.

    Args:
        values: ``factor_in``, ``factor_out`` and maybe ``core``, shaped as in the layers.
        gradients: Of the same names; absent, or None, where a factor has none.

    Example:
        >>> import torch
        >>> from lightning_accel.low_rank.factors.dense_gradient import dense_gradient
        >>> u, v, g = torch.eye(3)[:, :2], torch.eye(4)[:2], torch.arange(12.0).view(3, 4)
        >>> dense_gradient({"factor_out": u, "factor_in": v}, {"factor_out": g @ v.T, "factor_in": u.T @ g})
        tensor([[0., 1., 2., 3.],
                [4., 5., 6., 7.],
                [8., 9., 0., 0.]])
    """
    left, right = values["factor_out"].flatten(1), values["factor_in"].flatten(1)
    of_left, of_right = (_flat(gradients.get(name)) for name in ("factor_out", "factor_in"))
    shape = (len(left), *values["factor_in"].shape[1:])
    if "core" in values:
        core, of_core = values["core"].movedim(1, -1), gradients.get("core")
        kernel, ranks = core.shape[1:-1], core.shape[-1]
        shape = (len(left), right.shape[1], *kernel)
        stacked = core.reshape(-1, ranks)
        of_stacked = None if of_core is None else of_core.movedim(1, -1).reshape(-1, ranks)
        inner, of_inner = stacked @ right, _of_product(stacked, right, of_stacked, of_right)
        right = inner.view(len(core), *kernel, -1).movedim(-1, 1).flatten(1)
        of_right = None if of_inner is None else of_inner.view(len(core), *kernel, -1).movedim(-1, 1).flatten(1)
    result = _of_product(left, right, of_left, of_right)
    return None if result is None else result.view(shape)


def _of_product(left: Tensor, right: Tensor, of_left: Tensor | None, of_right: Tensor | None) -> Tensor | None:
    """Return the smallest ``G`` with ``G right^T = of_left`` and ``left^T G = of_right``, where these are known."""
    result = None
    if of_left is not None:
        result = of_left @ _inverse(right @ right.mT) @ right
    if of_right is not None:
        rest = of_right if result is None else of_right - left.mT @ result
        more = left @ _inverse(left.mT @ left) @ rest
        result = more if result is None else result + more
    return result


def _inverse(square: Tensor) -> Tensor:
    """Return the pseudo-inverse of a positive semidefinite matrix, which may be in half precision."""
    return torch.linalg.pinv(square.double() if square.dtype == torch.float64 else square.float(), hermitian=True).to(
        square.dtype
    )


def _flat(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.flatten(1)
