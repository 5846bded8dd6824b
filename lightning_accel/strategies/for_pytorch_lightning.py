"""The asynchronous strategy for Trainers of ``pytorch_lightning``."""

from typing import Any, ClassVar

from pytorch_lightning.strategies import ParallelStrategy

from lightning_accel.lightning_private import launcher_module
from lightning_accel.strategies.async_sgd import AsyncSGDBody
from lightning_accel.strategies.launcher import AsyncSGDLauncherBody

_MultiProcessingLauncher: Any = launcher_module("pytorch_lightning")._MultiProcessingLauncher


class AsyncSGDLauncher(AsyncSGDLauncherBody, _MultiProcessingLauncher):  # noqa: D101  # below
    __doc__ = AsyncSGDLauncherBody.__doc__


class AsyncSGDStrategy(AsyncSGDBody, ParallelStrategy):  # noqa: D101  # below
    __doc__ = AsyncSGDBody.__doc__
    distribution: ClassVar[str] = "pytorch_lightning"
    launcher_class = AsyncSGDLauncher
