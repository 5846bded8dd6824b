"""The asynchronous strategy for Trainers of ``lightning.pytorch``."""

from typing import Any, ClassVar

from lightning.pytorch.strategies import ParallelStrategy

from lightning_accel.lightning_private import launcher_module
from lightning_accel.strategies.async_sgd import AsyncSGDBody
from lightning_accel.strategies.launcher import AsyncSGDLauncherBody

_MultiProcessingLauncher: Any = launcher_module("lightning.pytorch")._MultiProcessingLauncher


class AsyncSGDLauncher(AsyncSGDLauncherBody, _MultiProcessingLauncher):  # noqa: D101  # below
    __doc__ = AsyncSGDLauncherBody.__doc__


class AsyncSGDStrategy(AsyncSGDBody, ParallelStrategy):  # noqa: D101  # below
    __doc__ = AsyncSGDBody.__doc__
    distribution: ClassVar[str] = "lightning.pytorch"
    launcher_class = AsyncSGDLauncher
