"""Low-rank factorization with measured ranks, and sequential freezing of the factors; pure torch.

"Rank quantization" chooses *matrix ranks* that the hardware likes. It has nothing to do with numeric precision.

In the order of use::

    plan = make_plan(model, run_batch, ratio=2.0)       # measures single layers; the model stays as it is
    replaced = decompose(model, plan)                   # in place; names, biases, hooks and modes stay
    decision = verify_plan(plan, time_variants)         # whole steps decide: what does not pay goes back to dense
    replace_parameters(optimizer, {weight: layer})      # in the middle of a training: moments are projected
    frozen = freeze(model, FreezingSchedule().frozen_group(epoch=3), user_frozen=frozen_parameters(model))
    merge(model)                                        # dense again
    adapt_structure(model, state_dict)                  # before loading: structure follows keys and shapes

Factored layers are `LowRankLinear` and `LowRankConv` (``factor_in``, ``factor_out``) and `TuckerConv` (``factor_in``,
``core``, ``factor_out``); each keeps the dense layer's ``bias``, has ``ranks``, ``weight`` (the product) and
``groups()``. See README.md in this folder for when it pays, the equations and all parameters.
"""

from lightning_accel.low_rank.adaptive import AdaptiveFreezing, frozen_prefix
from lightning_accel.low_rank.calls import LayerCall, input_second_moments, record_calls
from lightning_accel.low_rank.decompose import decompose, merge, swap
from lightning_accel.low_rank.eligibility import eligible_layers, left_alone, low_rank_layers
from lightning_accel.low_rank.factors.factorize import (
    EnergyProfile,
    empty_like,
    factorize,
    full_ranks,
    identity_factors,
    to_dense,
)
from lightning_accel.low_rank.factors.layers import LOW_RANK_TYPES, LowRankConv, LowRankLayer, LowRankLinear, TuckerConv
from lightning_accel.low_rank.freezing import (
    NUM_GROUPS,
    FreezingSchedule,
    factor_parameter_names,
    freeze,
    frozen_factor_index,
    frozen_parameters,
    mean_of_phases,
)
from lightning_accel.low_rank.in_place import as_it_is, become
from lightning_accel.low_rank.optimizers.exchange import (
    Replacement,
    orphans,
    put_weight,
    replace_by_merged,
    replace_parameters,
    undo_replacement,
)
from lightning_accel.low_rank.optimizers.kinds import MakeOptimizer, makers_by_layer, why_not_followed
from lightning_accel.low_rank.plan import Candidate, LayerPlan, RankPlan
from lightning_accel.low_rank.rank_search.candidates import plateau_candidates, theoretical_ranks
from lightning_accel.low_rank.rank_search.gate import (
    GateDecision,
    apply_decision,
    layer_groups,
    marginal_reverts,
    payback_steps,
    verify_plan,
)
from lightning_accel.low_rank.rank_search.search import make_plan
from lightning_accel.low_rank.rank_search.timing import DiskCache, default_cache_dir, time_layer
from lightning_accel.low_rank.structure import adapt_structure

__all__ = [
    "LOW_RANK_TYPES",
    "NUM_GROUPS",
    "AdaptiveFreezing",
    "Candidate",
    "DiskCache",
    "EnergyProfile",
    "FreezingSchedule",
    "GateDecision",
    "LayerCall",
    "LayerPlan",
    "LowRankConv",
    "LowRankLayer",
    "LowRankLinear",
    "MakeOptimizer",
    "RankPlan",
    "Replacement",
    "TuckerConv",
    "adapt_structure",
    "apply_decision",
    "as_it_is",
    "become",
    "decompose",
    "default_cache_dir",
    "eligible_layers",
    "empty_like",
    "factor_parameter_names",
    "factorize",
    "freeze",
    "frozen_factor_index",
    "frozen_parameters",
    "frozen_prefix",
    "full_ranks",
    "identity_factors",
    "input_second_moments",
    "layer_groups",
    "left_alone",
    "low_rank_layers",
    "make_plan",
    "makers_by_layer",
    "marginal_reverts",
    "mean_of_phases",
    "merge",
    "orphans",
    "payback_steps",
    "plateau_candidates",
    "put_weight",
    "record_calls",
    "replace_by_merged",
    "replace_parameters",
    "swap",
    "theoretical_ranks",
    "time_layer",
    "to_dense",
    "undo_replacement",
    "verify_plan",
    "why_not_followed",
]
