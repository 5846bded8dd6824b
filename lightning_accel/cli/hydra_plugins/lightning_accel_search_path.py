"""Make the accelerators composable in every Hydra app of the environment: the groups ``callbacks`` and ``strategy``.

Every Hydra app imports this file at start-up, so it imports nothing but Hydra's plugin interface. The other groups of
this package (models, data, trainers, ...) are for its own command; another app's ``--help`` does not show them.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin

_SHARED_GROUPS = ("callbacks", "strategy")
_SCHEME = "lightning-accel"
_PACKAGE = "lightning_accel.conf"


class LightningAccelSearchPath(SearchPathPlugin):
    """Append the shared groups to the search path, behind the app's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the groups; Hydra looks at the app's own first."""
        search_path.append(provider="lightning-accel", path=f"{_SCHEME}://{_PACKAGE}")


class SharedGroups(ConfigSource):
    """The shared groups of a package with configurations, as if it had no others.

    Args:
        provider: Name that Hydra shows.
        path: ``lightning-accel://`` and the package's dotted name.
    """

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider=provider, path=path)
        packages = next(kind for kind in Plugins.instance().discover(ConfigSource) if kind.scheme() == "pkg")
        self._package = packages(provider=provider, path=f"pkg://{self.path}")

    @staticmethod
    def scheme() -> str:
        """Return what stands before ``://``."""
        return _SCHEME

    def available(self) -> bool:
        """Say whether the package is there."""
        return bool(self._package.available())

    def load_config(self, config_path: str) -> ConfigResult:
        """Load a file of a shared group."""
        if not _is_shared(config_path):
            raise ConfigLoadError(f"Config not found : {config_path}")
        return self._package.load_config(config_path)

    def is_group(self, config_path: str) -> bool:
        """Say whether this is the root or a shared group."""
        return (not config_path or _is_shared(config_path)) and bool(self._package.is_group(config_path))

    def is_config(self, config_path: str) -> bool:
        """Say whether this is a file of a shared group."""
        return _is_shared(config_path) and bool(self._package.is_config(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List shared groups, or what is in one of them."""
        if config_path:
            return list(self._package.list(config_path, results_filter)) if _is_shared(config_path) else []
        return [] if results_filter is ObjectType.CONFIG else [name for name in _SHARED_GROUPS if self.is_group(name)]


def _is_shared(config_path: str) -> bool:
    return config_path.split("/", maxsplit=1)[0] in _SHARED_GROUPS
