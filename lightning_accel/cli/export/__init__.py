"""``lightning-accel export``: a checkpoint in, a plain model out."""

from lightning_accel.cli.export.command import export

__all__ = ["export"]
