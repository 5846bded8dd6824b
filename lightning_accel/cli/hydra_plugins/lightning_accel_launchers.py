"""``hydra/launcher=joblib`` and ``hydra/launcher=ray`` of this package: the jobs of a sweep side by side.

Every Hydra app of the environment imports this file at start-up, so it imports nothing but Hydra's plugin interface.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class JoblibLauncher(Launcher):
    """Run jobs in processes of this machine; see `lightning_accel.cli.sweep.launch_elsewhere.run_with_joblib`.

    Args:
        **settings: What stands in ``conf/hydra/launcher/joblib.yaml``, where each knob is explained.
    """

    runner = "run_with_joblib"

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives, until there are jobs."""
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return what became of each, in their order."""
        from lightning_accel.cli.sweep import launch_elsewhere

        jobs = launch_elsewhere.prepare(
            self.hydra_context, self.config, self.task_function, job_overrides, initial_job_idx
        )
        returned: Sequence[JobReturn] = getattr(launch_elsewhere, self.runner)(jobs, **self.settings)
        return returned


class RayLauncher(JoblibLauncher):
    """Run jobs on a Ray cluster; see `lightning_accel.cli.sweep.launch_elsewhere.run_with_ray`.

    Args:
        **settings: What stands in ``conf/hydra/launcher/ray.yaml``, where each knob is explained.
    """

    runner = "run_with_ray"
