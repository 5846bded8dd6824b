"""From a dense layer to a factored one and back: SVD and Tucker-2 in float32 or better."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_accel.low_rank.factors.factored import DenseLayer
from lightning_accel.low_rank.factors.layers import LowRankConv, LowRankLayer, LowRankLinear, TuckerConv
from lightning_accel.low_rank.factors.shared_vectors import LeadingVectors, SharedVectors, singular_vectors

_RIDGE = 1e-6  # of the mean eigenvalue: keeps the whitening invertible where an input never varies


def empty_like(dense: DenseLayer, ranks: Sequence[int]) -> LowRankLayer:
    """Make a factored layer with the settings, device and dtype of ``dense``; its factors are random.

    Args:
        dense: Layer to imitate. Its bias, if any, is *shared*: the new layer holds the same Parameter.
        ranks: ``(rank,)`` for any layer, or ``(r1, r2)`` for a convolution larger than 1x1 in Tucker-2 form.

    Raises:
        ValueError: If the number of ranks does not fit the layer.
    """
    weight = dense.weight
    allowed = (1, 2) if math.prod(weight.shape[2:]) != 1 else (1,)
    if len(ranks) not in allowed:
        numbers = " or ".join(map(str, allowed))
        raise ValueError(f"`ranks` must have {numbers} entries for {dense}, got {tuple(ranks)}.")
    layer: LowRankLayer
    if isinstance(dense, nn.Linear):
        layer = LowRankLinear(
            dense.in_features, dense.out_features, ranks[0], bias=False, device=weight.device, dtype=weight.dtype
        )
    else:
        settings = {
            "stride": dense.stride,
            "padding": dense.padding,
            "dilation": dense.dilation,
            "padding_mode": dense.padding_mode,
            "bias": False,
            "device": weight.device,
            "dtype": weight.dtype,
        }
        sizes = (dense.in_channels, dense.out_channels, dense.kernel_size)
        layer = (
            TuckerConv(*sizes, (ranks[0], ranks[1]), **settings)  # type: ignore[arg-type]
            if len(ranks) == 2
            else LowRankConv(*sizes, ranks[0], **settings)  # type: ignore[arg-type]
        )
    layer.bias = dense._parameters["bias"]
    for name in layer.factor_names:
        getattr(layer, name).requires_grad_(weight.requires_grad)
    return layer.train(dense.training)


def factorize(
    dense: DenseLayer,
    ranks: Sequence[int],
    *,
    second_moment: Tensor | None = None,
    shared: SharedVectors | None = None,
) -> LowRankLayer:
    r"""Return the factored layer that is nearest to ``dense``.

    One rank: ``min ||(W - U V) C^(1/2)||_F`` over matrices of that rank, W unfolded to (out, in * kernel), by an SVD,
    the square roots of the singular values on both sides. Where a singular value is zero (a layer that starts at zero,
    a rank beyond that of the weight), V keeps a row that can learn: with zeros on both sides neither factor would ever
    have a gradient. Two ranks: projection on the leading left singular vectors of
    the two channel unfoldings (truncated HOSVD, Tucker-2), the three factors scaled to one norm.

    Args:
        dense: Layer with finite weights. It is not changed; its bias is shared.
        ranks: ``(rank,)`` or ``(r1, r2)``, each between 1 and the full rank (larger ones are cut to it).
        second_moment: ``C``, the mean of ``x x^T`` over the layer's inputs, (in, in); None stands for the identity.
        shared: Where to look for singular vectors of this weight, if there is no ``second_moment``.

    Raises:
        ValueError: If a weight is NaN or infinite, a rank is below 1, their number does not fit, or ``second_moment``
            has another shape.

    References:
        Hajimolahoseini, Ahmed, Liu, arXiv:2309.03824. *Deviations*: the optional weighting by ``C``.

    Complexity: the eigenvectors of one Gram matrix in float64 per channel mode, on the weight's device; an SVD for one
    rank of a weight in float64.

    Example:
        >>> from torch import nn
        >>> from lightning_accel.low_rank import factorize
        >>> layer = factorize(nn.Linear(64, 32), (8,))
        >>> layer.factor_in.shape, layer.factor_out.shape
        (torch.Size([8, 64]), torch.Size([32, 8]))
    """
    full = full_ranks(dense, len(ranks))
    if len(ranks) == len(full):
        ranks = tuple(min(pair) for pair in zip(ranks, full, strict=True))
    layer = empty_like(dense, ranks)
    with torch.no_grad():
        weight, whiten, unwhiten = _whitened(dense, second_moment)
        vectors = LeadingVectors(weight) if shared is None or whiten is not None else shared.of(dense.weight, weight)
        if len(ranks) == 1:
            factors = _split_evenly(*vectors.matrix(ranks[0]))
        else:
            left, core, right = vectors.tucker(ranks)
            factors = {"factor_out": left, "core": core, "factor_in": right.T}
        if whiten is not None:
            inputs = factors["factor_in"].view(ranks[0], weight.shape[1], -1)
            factors["factor_in"] = torch.einsum("rik,ij->rjk", inputs, unwhiten)
            factors = _on_orthonormal_inputs(factors)
        if len(ranks) == 2:
            factors = _balanced(factors)
        for name, factor in factors.items():
            parameter = getattr(layer, name)
            parameter.copy_(factor.reshape(parameter.shape))
    return layer


def identity_factors(dense: DenseLayer) -> LowRankLayer:
    """Return the two-factor layer that equals ``dense`` without a decomposition: its weight beside an identity.

    For questions of the kind "does the model notice what kind of layer this is"; it saves nothing.
    """
    out, fan_in = dense.weight.shape[:2]
    first = isinstance(dense, nn.Linear) and fan_in <= out
    layer = empty_like(dense, (fan_in if first else out,))
    with torch.no_grad():
        identity, weight = (layer.factor_in, layer.factor_out) if first else (layer.factor_out, layer.factor_in)
        identity.copy_(torch.eye(identity.shape[0]).view_as(identity))
        weight.copy_(dense.weight.view_as(weight))
    return layer


def to_dense(layer: LowRankLayer) -> DenseLayer:
    """Return the dense layer whose weight is the product of the factors; the bias Parameter is shared.

    The product is formed in float32 or better and cast back.

    Example:
        >>> from lightning_accel.low_rank import LowRankLinear, to_dense
        >>> to_dense(LowRankLinear(64, 32, 8))
        Linear(in_features=64, out_features=32, bias=True)
    """
    with torch.no_grad():
        factors = {name: _precise(getattr(layer, name)) for name in layer.factor_names}
        weight = layer.product(factors).to(layer.factor_in.dtype).contiguous()
    trainable = any(getattr(layer, name).requires_grad for name in layer.factor_names)
    return layer.dense_layer(nn.Parameter(weight, requires_grad=trainable))


def full_ranks(dense: DenseLayer, count: int | None = None) -> tuple[int, ...]:
    """Return the ranks that keep everything.

    Args:
        dense: Layer.
        count: 1 for ``(rank,)``, 2 for ``(r1, r2)``; by default 2 for convolutions larger than 1x1, else 1.
    """
    out, fan_in, *kernel = dense.weight.shape
    positions = math.prod(kernel)
    if positions == 1 or count == 1:
        return (min(out, fan_in * positions),)
    return (min(fan_in, out * positions), min(out, fan_in * positions))


class EnergyProfile:
    """Retained energy ``||W'||^2 / ||W||^2`` of a layer at any rank (weighted by ``C``, if given).

    Truncated SVD and truncated HOSVD are orthogonal projections, so the relative squared error is one minus this.

    Args:
        dense: Layer with finite weights.
        second_moment: As in `factorize`.

    Raises:
        ValueError: If a weight is NaN or infinite or ``second_moment`` has another shape.
    """

    def __init__(self, dense: DenseLayer, second_moment: Tensor | None = None) -> None:
        with torch.no_grad():
            weight, _, _ = _whitened(dense, second_moment)
        self.vectors = LeadingVectors(weight)
        self._total = float(weight.double().square().sum())
        self._kept: dict[int, Tensor] = {}  # number of ranks to the energy kept at any up to some; made when asked for

    def __call__(self, ranks: Sequence[int]) -> float:
        """Return the energy kept at ``ranks``, in [0, 1]; a layer of zeros keeps everything."""
        if self._total == 0.0:
            return 1.0
        kept = self._kept.get(len(ranks))
        if kept is None or any(rank > size for rank, size in zip(ranks, kept.shape, strict=True)):
            kept = self.vectors.two_factor_energies() if len(ranks) == 1 else self.vectors.tucker_energies(ranks)
            kept = self._kept[len(ranks)] = kept.cpu()
        index = tuple(min(rank, size) - 1 for rank, size in zip(ranks, kept.shape, strict=True))
        return min(1.0, float(kept[index]) / self._total)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _whitened(dense: DenseLayer, second_moment: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the weight times C^(1/2), that root, and its inverse."""
    weight = _precise(dense.weight)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the weight of {dense} is NaN or infinite; restore a sound checkpoint before factorizing it.")
    if second_moment is None:
        return weight, None, weight
    fan_in = weight.shape[1]
    if second_moment.shape != (fan_in, fan_in):
        raise ValueError(f"`second_moment` must be {fan_in} x {fan_in} for {dense}, got {tuple(second_moment.shape)}.")
    values, vectors = torch.linalg.eigh(second_moment.to(weight.device, torch.float64))
    values = values.clamp_min(0.0) + _RIDGE * values.mean().clamp_min(torch.finfo(torch.float32).tiny)
    root = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors / values.sqrt()) @ vectors.T
    whitened = torch.einsum("oi...,ij->oj...", weight, root.to(weight.dtype))
    return whitened, root.to(weight.dtype), inverse.to(weight.dtype)


def _split_evenly(left: Tensor, values: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Return U and V of a truncated SVD, singular values on both sides; none of them is dead."""
    longest = max(left.shape[0], right.shape[1])
    zero = values <= values[0] * longest * torch.finfo(values.dtype).eps
    root = values.sqrt()
    if bool(zero.any()):
        alive = int((~zero).sum())
        # Of directions without a singular value the SVD returns any; these see all inputs, alike at every call.
        draw = torch.randn(len(values) - alive, right.shape[1], generator=torch.Generator().manual_seed(0)).to(right)
        draw -= draw @ right[:alive].T @ right[:alive]
        right = torch.cat([right[:alive], torch.linalg.qr(draw.T).Q.T])
        left, root = left.clone(), root.clone()
        left[:, alive:] = 0.0
        root[alive:] = root[:alive].mean() if alive else 1.0
    return {"factor_out": left * root, "factor_in": root[:, None] * right}


def _on_orthonormal_inputs(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the factors' inner basis so that the input factor reads orthogonal directions; their product stays.

    Where inputs hardly vary, the inverse root of their second moment is huge. The factor's rows, all but parallel,
    would lie along such directions, and first steps of an optimizer that moves all entries alike would undo the
    decomposition.
    """
    basis, change = torch.linalg.qr(factors["factor_in"].flatten(1).double().T)  # (in * kernel, rank), (rank, rank)
    if "core" in factors:
        core = torch.einsum("ba...,ca->bc...", factors["core"].double(), change)
        return factors | {"core": core, "factor_in": basis.T}
    split = _split_evenly(*singular_vectors(factors["factor_out"].double() @ change.T, change.shape[0]))
    return split | {"factor_in": split["factor_in"] @ basis.T}


def _balanced(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale the factors to one Frobenius norm; their product stays."""
    norms = {name: float(torch.linalg.vector_norm(factor)) for name, factor in factors.items()}
    mean = math.prod(norms.values()) ** (1.0 / len(norms))
    if mean == 0.0:
        return factors
    return {name: factor * (mean / norms[name]) for name, factor in factors.items()}
