"""Sequential freezing as a Lightning callback."""

from lightning_accel.callbacks.sequential_freezing.callback import SequentialFreezing

__all__ = ["SequentialFreezing"]
