"""``lightning-accel compare``: paired runs with and without the accelerators."""

from lightning_accel.cli.compare.command import compare

__all__ = ["compare"]
