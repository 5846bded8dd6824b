"""Make the configuration groups of this package composable in every Hydra app of the environment.

Every Hydra app imports this file at start-up, so it imports nothing but Hydra's plugin interface.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LightningAccelSearchPath(SearchPathPlugin):
    """Append ``pkg://lightning_accel.conf`` to the search path, behind the app's own groups."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the groups; Hydra looks at the app's own first."""
        search_path.append(provider="lightning-accel", path="pkg://lightning_accel.conf")
