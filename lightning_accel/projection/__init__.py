"""Projections onto l1,inf and multi-level balls, which clear whole groups of a tensor; pure torch.

In the order of use::

    radius = radius_for_sparsity(weight, 0.9, group_dims=(0,))    # clears 90 % of the rows
    project_l1inf(weight, radius, group_dims=(0,), out=weight)    # in place; method="exact" for the nearest point
    ball = L1InfBall(radius)                                      # the same as a differentiable layer
    smaller = shrink(model, example_inputs).model                 # without the zero groups

See README.md in this folder for the mathematics, what each method costs and how to use it in training.
"""

from lightning_accel.projection.ball import L1InfBall, MultilevelBall
from lightning_accel.projection.balls.exact import ExactState
from lightning_accel.projection.multilevel import (
    project_l1,
    project_l1inf,
    project_l11,
    project_l12,
    project_multilevel,
)
from lightning_accel.projection.shrink.shrink import Shrunk, shrink
from lightning_accel.projection.sparsity import radius_for_sparsity

__all__ = [
    "ExactState",
    "L1InfBall",
    "MultilevelBall",
    "Shrunk",
    "project_l1",
    "project_l1inf",
    "project_l11",
    "project_l12",
    "project_multilevel",
    "radius_for_sparsity",
    "shrink",
]
