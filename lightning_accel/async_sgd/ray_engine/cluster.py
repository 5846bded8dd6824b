"""Ray itself: started on this machine for one run, or a cluster that is there already, with a token in any case."""

import contextlib
import importlib.util
import math
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.async_sgd.ray_engine.ray_private import on_loopback, read_environment_again

LOOPBACK = "127.0.0.1"
_MODE, _TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # off, also in the processes that Ray starts, see `on_loopback`
_LEAST_STORE = 200 << 20  # bytes of shared memory; what lies there is one publication and a push a worker
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing goes to others' servers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's own default of tomorrow, of which it warns
}


def refuse_without_ray() -> None:
    """Say how to install Ray where it is not.

    Raises:
        ModuleNotFoundError: If Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError(
            "`engine='ray'` needs Ray, which is not installed: `pip install 'lightning-accel[ray]'`, on every machine "
            "of the cluster; or use `engine='shared_memory'` on one machine."
        )


@contextlib.contextmanager
def connected(options: RayOptions, *, cores: float, nbytes: int = 0) -> Iterator[Any]:
    """Yield `ray`, connected as the options say; what was started here is ended after.

    Args:
        options: Of the run.
        cores: That workers need, where Ray is started here.
        nbytes: Of the run's parameters, for the size of the store of objects.

    Raises:
        ModuleNotFoundError: If Ray is not installed.
        RuntimeError: If the cluster has no token, or another.
    """
    refuse_without_ray()
    if options.address is None and not _is_connected():
        with closed_to_others(), _started_here(cores, nbytes) as started:
            yield started
        return
    refuse_without_token(options)
    import ray

    read_environment_again()
    if _is_connected():
        yield ray
        return
    with contextlib.ExitStack() as kept:
        kept.enter_context(termination_kept())
        yield _joined(ray, options, kept)


def _joined(ray: Any, options: RayOptions, kept: contextlib.ExitStack) -> Any:
    try:
        ray.init(address=options.address, logging_level="warning", log_to_driver=True)
    except ConnectionError as error:
        raise RuntimeError(
            f"no Ray cluster answers at `address={options.address}` ({error}); start one with `ray start --head`, add "
            "machines with `ray start --address=...`, all with the same token in `RAY_AUTH_TOKEN`."
        ) from error
    kept.callback(ray.shutdown)
    return ray


def refuse_without_token(options: RayOptions) -> None:
    """Refuse a cluster on which everybody who reaches a port can run code.

    Raises:
        RuntimeError: If Ray's authentication is not switched on, and the caller did not say that it need not be.
    """
    if os.environ.get(_MODE, "").lower() == "token" or options.allow_without_token:
        return
    raise RuntimeError(
        "this Ray cluster would be used without a token, and whoever reaches one of its ports could run code on it: "
        "set `RAY_AUTH_MODE=token` and the same `RAY_AUTH_TOKEN` (`ray get-auth-token --generate` makes one) for "
        "`ray start` on every machine and for this program, or say `allow_without_token=True` in a network that only "
        "you can reach."
    )


def _is_connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _token_of_this_run() -> dict[str, str]:
    """Return what makes Ray ask for a token that nobody else knows; it dies with the run."""
    return {_MODE: "token", _TOKEN: os.environ.get(_TOKEN) or secrets.token_hex(32)}


@contextlib.contextmanager
def closed_to_others() -> Iterator[None]:
    """Let Ray that is started inside listen on loopback alone and ask for a token that dies with the run."""
    with _environment(_QUIET | _token_of_this_run() | {_CLUSTERS: "0"}), on_loopback(), termination_kept():
        read_environment_again()
        yield


@contextlib.contextmanager
def termination_kept() -> Iterator[None]:
    """Give SIGTERM its handler back, in whose place Ray puts its own for good when it connects."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _started_here(cores: float, nbytes: int) -> Iterator[Any]:
    import ray

    try:
        ray.init(
            address="local",  # never one that somebody else has started on this machine
            num_cpus=max(1, math.ceil(cores)),
            object_store_memory=_LEAST_STORE + 8 * nbytes,
            include_dashboard=False,
            logging_level="warning",
            log_to_driver=True,
            _node_ip_address=LOOPBACK,
        )
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        read_environment_again()
