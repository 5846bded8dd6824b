"""Make a rank plan: look at the model, measure its layers, choose."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from lightning_accel import measure
from lightning_accel.low_rank.calls import RunBatch, input_second_moments, record_calls
from lightning_accel.low_rank.choose import choose_by_paper, choose_fixed, choose_in_knapsack
from lightning_accel.low_rank.eligibility import eligible_layers, left_alone
from lightning_accel.low_rank.factors.factored import DenseLayer
from lightning_accel.low_rank.factors.factorize import EnergyProfile
from lightning_accel.low_rank.factors.shared_vectors import SharedVectors, weight_digest
from lightning_accel.low_rank.freezing import NUM_GROUPS
from lightning_accel.low_rank.optimizers.kinds import MakeOptimizer
from lightning_accel.low_rank.plan import (
    UNMEASURED,
    Candidate,
    LayerPlan,
    Method,
    RankPlan,
    Weighting,
    factor_parameters,
)
from lightning_accel.low_rank.rank_search.candidates import (
    every_rank,
    plateau_below,
    plateau_candidates,
    rank_unit,
    theoretical_ranks,
)
from lightning_accel.low_rank.rank_search.timing import DiskCache, Phase, Timer, candidate_name, time_layer


@dataclasses.dataclass(frozen=True)
class Target:
    """What the user asks for: exactly one of ratio, energy and speedup."""

    name: str
    value: float


def make_plan(
    model: nn.Module,
    run_batch: RunBatch | None,
    *,
    ratio: float | None = None,
    energy: float | None = None,
    speedup: float | None = None,
    method: Method = "knapsack",
    min_energy: float = 0.5,
    weighting: Weighting = "none",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    phase: Phase = "train",
    make_optimizer: MakeOptimizer | Mapping[str, MakeOptimizer] = torch.optim.AdamW,
    phase_weights: tuple[float, float] | None = None,
    cache_dir: Path | str | None = None,
    timer: Timer | None = None,
    shared: SharedVectors | None = None,
) -> RankPlan:
    """Choose a rank, or dense, for every linear and convolutional layer of a model on this machine.

    The model is only read; ``run_batch`` runs it once, and what that changes is for the caller to protect
    (`lightning_accel.measure.undisturbed`). Layers are timed as copies, outside the model.

    Args:
        model: Whose weights are worth keeping: the energies are theirs.
        run_batch: Runs one real batch; None is enough for ``method="fixed"`` and ``"snapped"`` without weighting.
        ratio: Target: dense weight entries over factor entries of the layers considered, > 1. The knapsack then keeps
            the most energy in the time and the entries of the theoretical ranks snapped down to plateaus.
        energy: Target: mean retained energy of the layers considered, in (0, 1]; the knapsack takes the least time.
        speedup: Target: dense over planned time of the layers considered, > 1; the knapsack keeps the most energy.
        method: ``"knapsack"``: measured plateaus, one choice for all layers together. ``"paper"``: layer by layer the
            largest drop in time between the ranks of ``ratio`` and ``ratio + 1``. ``"fixed"``: the theoretical rank
            of ``ratio``, unmeasured; layers with less than 1 % of the entries (heads, stems) stay dense.
            ``"snapped"``: the same, down to the next plateau (multiples of 32 or less). The last three need ``ratio``.
        min_energy: Floor of the retained energy of each layer, in [0, 1]; knapsack only.
        weighting: ``"activation"`` weighs energies (and the SVD) by the second moment of each layer's inputs.
        include: Shell patterns of module names to consider.
        exclude: Shell patterns of module names to leave alone.
        phase: Time a ``"train"`` step (forward, backward, update) or the ``"inference"`` forward.
        make_optimizer: Makes the optimizer whose update is timed, from a list of parameters; or one such function a
            layer, by name: layers without are timed with plain SGD.
        phase_weights: For a training under sequential freezing: time candidates as the mean over its two phases, by the
            schedule's ``weights``, >= 0 and not all 0. None times them with everything trainable.
        cache_dir: Keeps times and energies between runs, see `default_cache_dir`; None measures anew.
        timer: Replaces the clock, for tests.
        shared: Keeps the singular vectors behind the energies for `decompose`, where they are not weighted.

    Raises:
        ValueError: If not exactly one target is given, one is out of range, the method does not know the target,
            ``run_batch`` is missing, no layer can be factored or a weight is NaN or infinite.

    References:
        Hajimolahoseini, Ahmed, Liu, arXiv:2309.03824 (``method="paper"``). *Deviations*: see README.md.

    Example:
        >>> from torch import nn
        >>> from lightning_accel.low_rank import make_plan
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = make_plan(model, None, ratio=2.0, method="fixed")  # theoretical ranks; None: nothing is measured
        >>> plan.layers[0].ranks
        (16,)
    """
    target = _target(ratio=ratio, energy=energy, speedup=speedup)
    if method not in get_args(Method):
        raise ValueError(f"`method` must be knapsack, paper, fixed or snapped, got {method!r}.")
    if method != "knapsack" and target.name != "ratio":
        raise ValueError(f"method {method!r} needs `ratio`, got `{target.name}`; use method='knapsack' for it.")
    if not 0.0 <= min_energy <= 1.0:
        raise ValueError(f"`min_energy` must be in [0, 1], got {min_energy}.")
    if weighting not in ("none", "activation"):
        raise ValueError(f"`weighting` must be none or activation, got {weighting!r}.")
    if phase not in ("train", "inference"):
        raise ValueError(f"`phase` must be train or inference, got {phase!r}.")
    if phase_weights is not None and not (
        len(phase_weights) == NUM_GROUPS and min(phase_weights) >= 0.0 and 0.0 < sum(phase_weights) < math.inf
    ):
        raise ValueError(f"`phase_weights` must be {NUM_GROUPS} numbers >= 0, not all 0, got {tuple(phase_weights)}.")
    for patterns in (include, exclude):
        if isinstance(patterns, str):
            raise ValueError(
                f"`include` and `exclude` must be lists of patterns, got {patterns!r}; use [{patterns!r}]."
            )
    measured = method not in UNMEASURED
    if run_batch is None and (measured or weighting == "activation"):
        raise ValueError(
            "`run_batch` must run one real batch, got None; only methods 'fixed' and 'snapped' do without."
        )
    layers, skipped = eligible_layers(model, include=include, exclude=exclude)
    if not layers and not left_alone(skipped):
        raise ValueError(f"no nn.Linear, nn.Conv1d or nn.Conv2d can be factored; found: {skipped or 'none at all'}.")

    calls = record_calls(model, layers, run_batch) if run_batch is not None else {}
    moments: Mapping[str, Tensor] = {}
    if weighting == "activation" and run_batch is not None:
        moments = input_second_moments(model, layers, run_batch, shrink=True)
    cache = DiskCache(cache_dir) if cache_dir is not None else None
    drafts: list[LayerPlan] = []
    known_times: dict[object, dict[str, float]] = {}
    for name, dense in layers.items():
        called = calls.get(name)
        draft = LayerPlan(
            name=name,
            kind=type(dense).__name__,
            shape=tuple(dense.weight.shape),
            ranks=None,
            decision="dense",
            reason="never called in the batch" if run_batch is not None and called is None else "dense is kept",
            calls=called.calls if called is not None else None,
            input_shape=called.shape if called is not None else None,
        )
        if run_batch is None or called is not None:
            draft = _with_candidates(
                draft,
                dense,
                moments.get(name),
                method=method,
                target=target,
                cache=None if moments else cache,
                shared=None if moments else shared,
            )
        if measured and called is not None and draft.candidates:
            maker = make_optimizer.get(name, torch.optim.SGD) if isinstance(make_optimizer, Mapping) else make_optimizer
            trains = dense.weight.requires_grad
            signature = (type(dense), dense.extra_repr(), dense.weight.dtype, trains, called, maker)
            if signature not in known_times:
                ranks = [candidate.ranks for candidate in draft.candidates]
                known_times[signature] = time_layer(
                    dense,
                    ranks,
                    called,
                    phase=phase,
                    make_optimizer=maker,
                    phase_weights=phase_weights,
                    cache=cache,
                    timer=timer,
                )
            draft = _with_times(draft, known_times[signature])
        drafts.append(draft)
    if method == "knapsack":
        decided = choose_in_knapsack(drafts, target.name, target.value, min_energy=min_energy)
    elif method == "paper":
        decided = [choose_by_paper(draft) for draft in drafts]
    else:
        decided = choose_fixed(drafts)
    return _assemble(model, decided, skipped, method=method, target=target, weighting=weighting)


def _target(**targets: float | None) -> Target:
    given = [Target(name, value) for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of `ratio`, `energy` and `speedup`, got {[t.name for t in given]}.")
    target = given[0]
    if target.name == "energy" and not 0.0 < target.value <= 1.0:
        raise ValueError(f"`energy` must be in (0, 1], got {target.value}.")
    if target.name != "energy" and not (target.value > 1.0 and math.isfinite(target.value)):
        raise ValueError(f"`{target.name}` must be > 1, got {target.value}.")
    return target


def _with_candidates(
    draft: LayerPlan,
    dense: DenseLayer,
    moment: Tensor | None,
    *,
    method: Method,
    target: Target,
    cache: DiskCache | None,
    shared: SharedVectors | None,
) -> LayerPlan:
    """Add the ranks to consider and their energies."""
    if method == "fixed":
        ranks = [theoretical_ranks(draft.shape, target.value)]
    elif method == "snapped":
        ranks = [plateau_below(theoretical_ranks(draft.shape, target.value))]
    elif method == "paper":
        ranks = every_rank(draft.shape, target.value)
    else:
        ratio = target.value if target.name == "ratio" else None
        ranks = plateau_candidates(draft.shape, ratio, unit=rank_unit(dense.weight.device.type))
    ranks = [r for r in ranks if factor_parameters(draft.shape, r) < draft.dense_parameters]
    if not ranks:
        return dataclasses.replace(draft, reason="too small: no rank has fewer parameters than the dense layer")
    if not dense.weight.any():
        return dataclasses.replace(draft, reason="its weight is zero: nothing tells yet which rank it will need")
    names = [candidate_name(r) for r in ranks]
    digest = "" if cache is None and shared is None else weight_digest(dense.weight)
    key = f"energy-{digest}"
    energies = cache.read(key) if cache is not None else {}
    if not set(names) <= set(energies):
        profile = EnergyProfile(dense, moment)
        profile.vectors.prepare(ranks, decompose=shared is not None)
        if shared is not None:
            shared.keep(digest, profile.vectors, ranks)
        energies |= {name: profile(r) for name, r in zip(names, ranks, strict=True)}
        if cache is not None:
            cache.write(key, energies)
    candidates = tuple(
        Candidate(ranks=r, energy=energies[name], parameters=factor_parameters(draft.shape, r))
        for name, r in zip(names, ranks, strict=True)
    )
    return dataclasses.replace(draft, candidates=candidates)


def _with_times(draft: LayerPlan, times: Mapping[str, float]) -> LayerPlan:
    timed = tuple(dataclasses.replace(c, ms=times[candidate_name(c.ranks)]) for c in draft.candidates)
    return dataclasses.replace(draft, dense_ms=times[candidate_name(None)], candidates=timed)


def _assemble(
    model: nn.Module,
    decided: Sequence[LayerPlan],
    skipped: Mapping[str, str],
    *,
    method: Method,
    target: Target,
    weighting: Weighting,
) -> RankPlan:
    """Put decided and skipped layers in the model's order and say how far the target was reached."""
    entries = {layer.name: layer for layer in decided}
    for name, reason in skipped.items():
        module = model.get_submodule(name)
        weight = module._parameters.get("weight")
        known = weight is not None and not nn.parameter.is_lazy(weight)
        entries[name] = LayerPlan(
            name=name,
            kind=type(module).__name__,
            shape=tuple(weight.shape) if known and weight is not None else (),
            ranks=None,
            decision="skipped",
            reason=reason,
        )
    ordered = tuple(entries[name] for name, _ in model.named_modules() if name in entries)
    return RankPlan(
        layers=ordered,
        method=method,
        target=target.name,
        value=target.value,
        weighting=weighting,
        device=measure.environment(next(model.parameters()).device),
    ).with_reached()
