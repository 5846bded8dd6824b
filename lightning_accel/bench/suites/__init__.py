"""The suites: each is a module with ``rows(*, device, ...)``, which yields `BenchRow`s."""

import pkgutil


def suites() -> list[str]:
    """Return the names of the suites."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
