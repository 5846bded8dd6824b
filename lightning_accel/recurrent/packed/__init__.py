"""Packed sequences, run by the kernels for padded ones."""

from lightning_accel.recurrent.packed.run_padded import RunPackedPadded

__all__ = ["RunPackedPadded"]
