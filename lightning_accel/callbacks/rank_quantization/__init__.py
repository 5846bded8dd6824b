"""Rank quantization as a Lightning callback."""

from lightning_accel.callbacks.rank_quantization.callback import RankQuantization

__all__ = ["RankQuantization"]
