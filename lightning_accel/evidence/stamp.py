"""When something was measured, and with which versions."""

import contextlib
import datetime
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("lightning-accel", "lightning", "hydra-core", "torch")


def stamp() -> dict[str, str]:
    """Return the day and the versions of what took part."""
    found = {"date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
