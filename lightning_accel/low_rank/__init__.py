"""Low-rank factorization with measured ranks, and sequential freezing of the factors; pure torch.

"Rank quantization" chooses *matrix ranks* that the hardware likes. It has nothing to do with numeric precision.

In the order of use::

    plan = make_plan(model, run_batch, ratio=2.0)       # measures single layers; the model stays as it is
    replaced = decompose(model, plan)                   # in place; names, biases, hooks and modes stay
    decision = verify_plan(plan, time_variants)         # whole steps decide: what does not pay goes back to dense
    replace_parameters(optimizer, {weight: layer})      # in the middle of a training: moments are projected
    MatchedUpdates(optimizer, {layer: update_multiplier(layer)})  # Adam and kin: steps as long as the dense weight's
    frozen = freeze(model, FreezingSchedule().frozen_group(epoch=3), user_frozen=frozen_parameters(model))
    merge(model)                                        # dense again
    adapt_structure(model, state_dict)                  # before loading: structure follows keys and shapes

Factored layers are `LowRankLinear` and `LowRankConv` (``factor_in``, ``factor_out``) and `TuckerConv` (``factor_in``,
``core``, ``factor_out``); each keeps the dense layer's ``bias``, has ``ranks``, ``weight`` (the product) and
``groups()``. See README.md in this folder for when it pays, the equations and all parameters.
"""

from lightning_accel.low_rank.adaptive import AdaptiveFreezing
from lightning_accel.low_rank.decompose import decompose, merge
from lightning_accel.low_rank.eligibility import eligible_layers, low_rank_layers
from lightning_accel.low_rank.factors.factorize import factorize, to_dense
from lightning_accel.low_rank.factors.layers import LowRankConv, LowRankLinear, TuckerConv
from lightning_accel.low_rank.factors.shared_vectors import SharedVectors
from lightning_accel.low_rank.freezing import FreezingSchedule, freeze, frozen_parameters
from lightning_accel.low_rank.optimizers.exchange import replace_parameters
from lightning_accel.low_rank.optimizers.matched_updates import MatchedUpdates, update_multiplier
from lightning_accel.low_rank.plan import RankPlan
from lightning_accel.low_rank.rank_search.candidates import theoretical_ranks
from lightning_accel.low_rank.rank_search.search import make_plan
from lightning_accel.low_rank.structure import adapt_structure

__all__ = [
    "AdaptiveFreezing",
    "FreezingSchedule",
    "LowRankConv",
    "LowRankLinear",
    "MatchedUpdates",
    "RankPlan",
    "SharedVectors",
    "TuckerConv",
    "adapt_structure",
    "decompose",
    "eligible_layers",
    "factorize",
    "freeze",
    "frozen_parameters",
    "low_rank_layers",
    "make_plan",
    "merge",
    "replace_parameters",
    "theoretical_ranks",
    "to_dense",
    "update_multiplier",
]
