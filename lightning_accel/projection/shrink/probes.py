"""Inputs a model is compared on: the example, and others that differ from it in all that may differ."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_accel.projection.shrink.nested import tensors_in, with_tensors

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_WAYS = 4  # in which values that are picked from few are varied
_SMALL, _WIDE = 2, 3  # two of them
_SIZES = 3  # sizes beside the batch that are varied


@dataclass
class Probes:
    """Inputs that the model runs on.

    Attributes:
        inputs: Positional and named arguments; the example first.
        fixed: What could not be varied, for the model refused every variation: what depends on it is not known.
    """

    inputs: list[Inputs] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)


def make_probes(args: tuple[Any, ...], kwargs: Mapping[str, Any], run: Callable[[Inputs], object], seed: int) -> Probes:
    """Vary the tensors of an example in ways that ``run`` accepts.

    Floating-point tensors get noise of their own size and more. Booleans, integers and floating-point masks (two
    values: 0 and 1, or 0 and minus infinity) are drawn anew within their range, shuffled and flipped; integers also
    beyond it, as far as the model takes them. The batch and each other size that several dimensions may share are made
    smaller.

    Args:
        args: Positional arguments of the model.
        kwargs: Named ones.
        run: Calls the model; what it raises on the example comes out, any other input it raises on is left out.
        seed: Of the variations.
    """
    example: Inputs = (args, dict(kwargs))
    run(example)
    probes = Probes([example])
    generator = torch.Generator().manual_seed(seed)
    tensors = [x for x in tensors_in(example) if x.numel() and x.layout == torch.strided and not x.is_quantized]
    picked = [x for x in tensors if _is_picked(x)]
    measured = [x for x in tensors if not _is_picked(x)]

    def varied(changes: Mapping[int, Tensor]) -> bool:
        inputs = with_tensors(example, lambda x: changes.get(id(x), x))
        try:
            run(inputs)
        except Exception:  # whatever a model raises on what it was not made for
            return False
        probes.inputs.append(inputs)
        return True

    noisy: dict[int, Tensor] = {}
    if measured:
        ways = ({id(x): change(x, generator) for x in measured} for change in (_noise, _far, _stretched))
        found = [changes for changes in ways if varied(changes)]
        noisy = found[0] if found else {}
        if not found:
            probes.fixed += [_named(x) for x in measured]
    moved: set[int] = set()
    for way in range(_WAYS):
        drawn = {id(x): _drawn(x, way, generator) for x in picked}
        alone = ({key: value} for key, value in drawn.items())
        tries: Iterator[dict[int, Tensor]] = iter([noisy | drawn, drawn] if noisy else [drawn])
        done = next((changes for changes in tries if picked and varied(changes)), None)
        accepted = [done] if done is not None else [changes for changes in alone if varied(changes)]
        moved |= {id(x) for x in picked for c in accepted if id(x) in c and not torch.equal(c[id(x)], x)}
    probes.fixed += [_named(x) for x in picked if id(x) not in moved]
    for changes in _smaller(tensors):
        varied(changes)
    return probes


def _is_picked(x: Tensor) -> bool:
    """Whether entries are picked from few values: booleans, integers, masks of 0 and 1 or 0 and minus infinity."""
    if not (x.is_floating_point() or x.is_complex()):
        return True
    return not x.is_complex() and bool(((x == 0) | (x == 1)).all() | ((x == 0) | _is_low(x)).all() & _is_low(x).any())


def _is_low(x: Tensor) -> Tensor:
    return x <= torch.finfo(x.dtype).min / 2


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return x.detach() + _normal(x, generator)


def _far(x: Tensor, generator: torch.Generator) -> Tensor:
    finite = x.detach().abs().nan_to_num(0.0, 0.0, 0.0)
    return (3.0 * max(1.0, float(finite.max()))) * _normal(x, generator) - x.detach()


def _stretched(x: Tensor, generator: torch.Generator) -> Tensor:
    """Keep signs and bounds, for models that refuse anything else."""
    return x.detach() * torch.rand(x.shape, generator=generator, device="cpu").to(x)


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device="cpu").to(x)


def _drawn(x: Tensor, way: int, generator: torch.Generator) -> Tensor:
    """Return other values: within the range, shuffled (booleans and masks: flipped), small ones, beyond the range."""
    x = x.detach()
    uniform = torch.rand(x.shape, generator=generator, device="cpu").to(x.device)
    if x.dtype == torch.bool:
        return (uniform < 0.5, ~x, uniform < 0.1, uniform < 0.9)[way]
    if x.is_floating_point():
        other = x.min() if bool(_is_low(x).any()) else x.new_ones(())
        return torch.where((uniform < 0.5) if way != 1 else x == 0, other, torch.zeros_like(x))
    low, high = int(x.min()), int(x.max())
    if way == 1 and low < high:
        return x.flatten()[torch.randperm(x.numel(), generator=generator, device="cpu").to(x.device)].view(x.shape)
    if way == _SMALL:  # what stands for padding and the like
        return torch.where(uniform < 0.3, (uniform * 10).to(x.dtype), x)
    if way == _WIDE and x.device.type == "cpu":  # an index beyond its range ends a process on a GPU
        return (uniform * (2 * high - low + 2)).to(x.dtype) + low
    low = min(low, 1) if low > 0 or low == high > 0 else low
    drawn = (uniform * (high - low + 1)).to(x.dtype) + low
    # lengths are often wanted in falling order
    return drawn.sort(descending=True).values if x.dim() == 1 else drawn


def _smaller(tensors: list[Tensor]) -> Iterator[dict[int, Tensor]]:
    """Cut the batch, and each other size wherever it occurs; integers that count up to it with it."""
    batches = {x.shape[0] for x in tensors if x.dim()}
    if len(batches) == 1 and (size := batches.pop()) > 1:
        yield {id(x): x.detach()[: size - 1] for x in tensors if x.dim()}
    sizes = sorted({n for x in tensors for n in x.shape[1:] if n > 1})
    for size in sizes[:_SIZES]:
        cut = {id(x): _cut(x, size) for x in tensors}
        yield cut
        bounded = {id(x) for x in tensors if not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)}
        yield {key: value.clamp(max=size - 1) if key in bounded else value for key, value in cut.items()}


def _cut(x: Tensor, size: int) -> Tensor:
    x = x.detach()
    for dim in range(1, x.dim()):
        if x.shape[dim] == size:
            x = x.narrow(dim, 0, size - 1)
    return x


def _named(x: Tensor) -> str:
    return f"an input of {str(x.dtype).removeprefix('torch.')} and shape {tuple(x.shape)}"
