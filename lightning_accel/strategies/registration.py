"""Make ``strategy="async_sgd"`` known to Lightning without importing it.

Lightning has no entry point for strategies. Where it is imported already, the name is registered at once; otherwise a
finder waits for the import of its ``strategies`` package, registers right after, and is gone.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "async_sgd"
DESCRIPTION = "asynchronous SGD with a parameter server in the parent process"
_HOMES = {
    "lightning.pytorch.strategies": "lightning_accel.strategies.for_lightning",
    "pytorch_lightning.strategies": "lightning_accel.strategies.for_pytorch_lightning",
}


def register_by_name() -> None:
    """Register the strategy for each distribution of Lightning, now or as soon as it is imported."""
    for package, home in _HOMES.items():
        module = sys.modules.get(package)
        if module is not None and hasattr(module, "StrategyRegistry"):
            _register(module, home)
        elif not any(isinstance(finder, _Waiting) and finder.package == package for finder in sys.meta_path):
            sys.meta_path.insert(0, _Waiting(package, home))


def _register(strategies: ModuleType, home: str) -> None:
    registry = strategies.StrategyRegistry
    if NAME not in registry:
        registry.register(NAME, _lazily(home), description=DESCRIPTION)


def _lazily(home: str) -> Callable[[], object]:
    def build() -> object:
        strategy: object = importlib.import_module(home).AsyncSGDStrategy()
        return strategy

    return build


class _Waiting(MetaPathFinder):
    """Wait for one package; the real finders do the finding."""

    def __init__(self, package: str, home: str) -> None:
        self.package = package
        self._home = home

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Return the package's own specification with a loader that registers afterwards; None for all others."""
        if fullname != self.package:
            return None
        for finder in list(sys.meta_path):
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:  # somebody may only ask where it is, so this finder stays till it is loaded
                    spec.loader = _Registering(spec.loader, self)
                return spec
        return None

    def registered(self, module: ModuleType) -> None:
        """Register in the package that has been loaded, and be gone."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        _register(module, self._home)


class _Registering(Loader):
    """A loader that registers after the real one has run."""

    def __init__(self, loader: Loader, waiting: _Waiting) -> None:
        self._loader = loader
        self._waiting = waiting

    def __getattr__(self, name: str) -> Any:
        """Answer for the real loader whatever else is asked, such as the source."""
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the real loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the package, then register, and put the real loader back into its place."""
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._waiting.registered(module)
