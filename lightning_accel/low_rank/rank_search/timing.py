"""Measure one layer, dense and at many ranks, outside the model; remember the result on disk."""

import contextlib
import copy
import functools
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_accel import measure
from lightning_accel.low_rank.calls import LayerCall
from lightning_accel.low_rank.factors.factored import DenseLayer
from lightning_accel.low_rank.factors.factorize import empty_like
from lightning_accel.low_rank.factors.layers import LowRankLayer
from lightning_accel.low_rank.freezing import NUM_GROUPS, freeze, frozen_parameters, mean_of_phases
from lightning_accel.low_rank.optimizers.kinds import MakeOptimizer, description

Phase = Literal["train", "inference"]
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, Sequence[float]]]
"""Gets callables by candidate name (``"dense"``, ``"64"``, ``"32x48"``), returns the seconds of each call."""

_ROUNDS, _MIN_ROUNDS, _SECONDS = 15, 5, 2.5
_REVISION = 3  # of the layers' code: what was measured with other code does not hold
_MANY = 32  # candidates; beyond, the budget rules alone


def candidate_name(ranks: Sequence[int] | None) -> str:
    """Name a candidate: ``"dense"``, ``"64"`` or ``"32x48"``."""
    return "dense" if ranks is None else "x".join(map(str, ranks))


def time_layer(
    dense: DenseLayer,
    candidates: Sequence[tuple[int, ...]],
    call: LayerCall,
    *,
    phase: Phase = "train",
    make_optimizer: MakeOptimizer = torch.optim.AdamW,
    phase_weights: tuple[float, float] | None = None,
    cache: "DiskCache | None" = None,
    timer: Timer | None = None,
) -> dict[str, float]:
    """Return the median milliseconds of the dense layer and of each candidate, all calls of a batch together.

    Copies of the layer run on random input of the recorded shape, interleaved in shuffled order: forward, backward
    with the gradients that the model needs, and the optimizer's update; or the forward alone.

    Args:
        dense: Not touched.
        candidates: Ranks to time besides the dense layer.
        call: What the layer sees in a batch.
        phase: ``"train"`` or ``"inference"``.
        make_optimizer: Makes the optimizer whose update is part of a training step.
        phase_weights: Time candidates under sequential freezing: the mean over steps with group 0 and with group 1 at
            rest, by these weights. None times them with everything trainable.
        cache: Where to look first and to keep the result.
        timer: Replaces the clock, for tests.
    """
    names = [candidate_name(None), *map(candidate_name, candidates)]
    weights = (1.0,) if phase_weights is None or phase == "inference" else phase_weights
    optimizer = description(make_optimizer, dense.weight) if phase == "train" else ""
    if optimizer is None:  # it can not be told from others
        cache = None
    key = _key(dense, call, phase, f"{optimizer} {weights}")
    known = cache.read(key) if cache is not None and timer is None else {}
    if not set(names) <= set(known):
        device = dense.weight.device
        timer_or_clock = timer or functools.partial(
            measure.time_interleaved,
            rounds=_ROUNDS,
            warmup=2 if len(names) <= _MANY else 1,
            device=device,
            budget_seconds=_SECONDS,
            min_rounds=_MIN_ROUNDS if len(names) <= _MANY else 1,
        )
        with _random_state_kept(device):
            steps = _steps(dense, candidates, call, phase, make_optimizer, frozen=len(weights) > 1)
            seconds = timer_or_clock(steps)
        if len(weights) > 1:
            averaged = {
                name: mean_of_phases([seconds[f"{name}/{g}"] for g in range(NUM_GROUPS)], weights) for name in names[1:]
            }
            seconds = {names[0]: seconds[names[0]], **averaged}
        # Times that are compared with each other were taken in one go; earlier ones of other ranks are kept beside.
        known |= {name: 1000.0 * call.calls * statistics.median(seconds[name]) for name in names}
        if cache is not None and timer is None:
            cache.write(key, known)
    return {name: known[name] for name in names}


def default_cache_dir() -> Path:
    """Return the folder for measured times below the user's cache folder (``XDG_CACHE_HOME`` or ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_accel" / "low_rank"


class DiskCache:
    """Small JSON files, one a key; an unreadable one counts as missing.

    Args:
        folder: Made on the first write.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def read(self, key: str) -> dict[str, float]:
        """Return what was written under ``key``, or nothing."""
        try:
            data = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            return {str(name): float(value) for name, value in data.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def write(self, key: str, values: Mapping[str, float]) -> None:
        """Keep ``values``; several processes may write at a time. A folder that can not be written is no error."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f"{key}.{os.getpid()}.part"
            part.write_text(json.dumps(dict(values)), encoding="utf-8")
            part.replace(self.folder / f"{key}.json")


def _key(dense: DenseLayer, call: LayerCall, phase: Phase, optimizer: str) -> str:
    description = [
        _REVISION,
        sorted(measure.environment(dense.weight.device).items()),
        dense.extra_repr(),
        type(dense).__name__,
        str(dense.weight.dtype),
        dense.weight.requires_grad,
        repr(call),
        phase,
        optimizer if phase == "train" else "",
    ]
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:32]


def _steps(
    dense: DenseLayer,
    candidates: Sequence[tuple[int, ...]],
    call: LayerCall,
    phase: Phase,
    make_optimizer: MakeOptimizer,
    *,
    frozen: bool,
) -> dict[str, Callable[[], object]]:
    bare = _bare_copy(dense)
    layers: dict[str, nn.Module] = {candidate_name(None): bare}
    for ranks in candidates:
        name = candidate_name(ranks)
        if not frozen:
            layers[name] = _with_own_bias(empty_like(bare, ranks))
            continue
        for group in range(NUM_GROUPS):
            layer = layers[f"{name}/{group}"] = _with_own_bias(empty_like(bare, ranks))
            freeze(layer, group, user_frozen=frozen_parameters(layer))
    x = torch.randn(call.shape, dtype=call.dtype, device=dense.weight.device)
    if call.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    if phase == "inference":
        return {name: functools.partial(_forward, layer, x, call) for name, layer in layers.items()}
    x.requires_grad_(call.needs_grad)
    with torch.no_grad(), _autocast(x, call):
        gradient = torch.randn_like(bare(x))
    return {
        name: functools.partial(_train, layer, x, gradient, call, _optimizer(layer, make_optimizer))
        for name, layer in layers.items()
    }


def _train(
    layer: nn.Module, x: Tensor, gradient: Tensor, call: LayerCall, optimizer: torch.optim.Optimizer | None
) -> None:
    x.grad = None
    with torch.enable_grad():
        with _autocast(x, call):
            y = layer(x)
        if y.requires_grad:
            y.backward(gradient)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _forward(layer: nn.Module, x: Tensor, call: LayerCall) -> None:
    with torch.no_grad(), _autocast(x, call):
        layer(x)


def _optimizer(layer: nn.Module, make_optimizer: MakeOptimizer) -> torch.optim.Optimizer | None:
    trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return make_optimizer(trainable) if trainable else None


def _bare_copy(dense: DenseLayer) -> DenseLayer:
    """Copy without the user's hooks and gradients: they are no part of the layer's work."""
    bare = copy.copy(dense)
    bare._parameters = {
        name: None if p is None else nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
        for name, p in dense._parameters.items()
    }
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(bare, name, type(getattr(dense, name))())
    return bare


def _with_own_bias(layer: LowRankLayer) -> LowRankLayer:
    bias = layer._parameters["bias"]
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer


@contextlib.contextmanager
def _autocast(x: Tensor, call: LayerCall) -> Iterator[None]:
    with torch.autocast(x.device.type, dtype=call.autocast, enabled=call.autocast is not None):
        yield


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
