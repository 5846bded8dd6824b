"""Which parameters would be kept in the l1,inf ball, and what that takes."""

from lightning_accel.callbacks.projection.l1inf_projection import L1InfProjection
from lightning_accel.cli.plan import Scene
from lightning_accel.cli.plan.multilevel_projection import show, watch

__all__ = ["sketch", "watch"]


def sketch(scene: Scene) -> None:
    """Print the table of `multilevel_projection.show`.

    Raises:
        UsageError: If no parameter fits, or one holds NaN or infinity.
    """
    show(scene, "l1inf_projection", L1InfProjection(**scene.settings))
