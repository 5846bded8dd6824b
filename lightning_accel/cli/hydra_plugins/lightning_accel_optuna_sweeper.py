"""``hydra/sweeper=optuna`` of this package: a search that fails one trial at a time and goes on after a kill.

Every Hydra app of the environment imports this file at start-up, so it imports nothing but Hydra's plugin interface.
"""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSearch(Sweeper):
    """Hand the words of a multirun to `lightning_accel.cli.sweep.search.Search`.

    Args:
        **settings: What stands in ``conf/hydra/sweeper/optuna.yaml``, where each knob is explained.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives, until the search starts."""
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def sweep(self, arguments: list[str]) -> None:
        """Search."""
        from lightning_accel.cli.sweep.search import Search

        Search(self.settings, self.config, self.hydra_context, self.task_function).run(arguments)
