"""The private parts of Ray that this engine touches, each with its reason."""

import contextlib
from collections.abc import Iterator
from typing import Any


def read_environment_again() -> None:
    """Let Ray read authentication mode and token from the environment again; it keeps what it read when imported."""
    from ray import _raylet

    compiled: Any = _raylet  # of which type checkers know nothing
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Let Ray that is started inside take loopback for its address, and bind every port there.

    Told ``_node_ip_address="127.0.0.1"``, Ray looks for an address that other machines reach and binds all interfaces,
    unless it was built for one machine only; the switch for that is read once, when Ray is imported.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
