"""Remove zero groups physically: a smaller dense model that computes the same."""

from lightning_accel.projection.shrink.shrink import Shrunk, shrink

__all__ = ["Shrunk", "shrink"]
