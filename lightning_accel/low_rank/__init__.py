"""Low-rank factorization with measured ranks, and sequential freezing of the factors; pure torch.

"Rank quantization" chooses *matrix ranks* that the hardware likes. It has nothing to do with numeric precision.

In the order of use::

    plan = make_plan(model, run_batch, ratio=2.0)       # measures single layers; the model stays as it is
    replaced = decompose(model, plan)                   # in place; names, biases, hooks and modes stay
    swapped = replace_parameters(optimizer, {...})      # in the middle of a training: moments are projected
    frozen = freeze(model, FreezingSchedule().frozen_group(epoch=3), user_frozen=frozen_parameters(model))
    merge(model)                                        # dense again
    adapt_structure(model, state_dict)                  # before loading: structure follows keys and shapes

Factored layers are `LowRankLinear` and `LowRankConv` (``factor_in``, ``factor_out``) and `TuckerConv` (``factor_in``,
``core``, ``factor_out``); each keeps the dense layer's ``bias``, has ``ranks``, ``weight`` (the product) and
``groups()``. See README.md in this folder for when it pays, the equations and all parameters.
"""

from lightning_accel.low_rank.decompose import decompose, merge, swap
from lightning_accel.low_rank.eligibility import eligible_layers, low_rank_layers
from lightning_accel.low_rank.factorize import EnergyProfile, factorize, full_ranks, to_dense
from lightning_accel.low_rank.freezing import (
    NUM_GROUPS,
    FreezingSchedule,
    freeze,
    frozen_factor_index,
    frozen_parameters,
)
from lightning_accel.low_rank.layers import LOW_RANK_TYPES, LowRankConv, LowRankLayer, LowRankLinear, TuckerConv
from lightning_accel.low_rank.plan import Candidate, LayerPlan, RankPlan
from lightning_accel.low_rank.structure import adapt_structure

__all__ = [
    "LOW_RANK_TYPES",
    "NUM_GROUPS",
    "Candidate",
    "EnergyProfile",
    "FreezingSchedule",
    "LayerPlan",
    "LowRankConv",
    "LowRankLayer",
    "LowRankLinear",
    "RankPlan",
    "TuckerConv",
    "adapt_structure",
    "decompose",
    "eligible_layers",
    "factorize",
    "freeze",
    "frozen_factor_index",
    "frozen_parameters",
    "full_ranks",
    "low_rank_layers",
    "merge",
    "swap",
    "to_dense",
]
