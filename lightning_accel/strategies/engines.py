"""Which engine carries an asynchronous run, and how a `fit` is started on it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch

from lightning_accel.arguments import check_choice
from lightning_accel.async_sgd import Statistics, run_workers
from lightning_accel.async_sgd.ray_engine.cluster import refuse_without_ray
from lightning_accel.async_sgd.shared_memory.spawn import StartMethod
from lightning_accel.async_sgd.shared_memory.supervisor import Ending, Remains

Engine = Literal["shared_memory", "ray"]


def checked_engine(engine: Engine) -> Engine:
    """Return ``engine``.

    Raises:
        ValueError: If there is none of this name.
        ModuleNotFoundError: For ``ray``, if Ray is not installed.
    """
    check_choice("engine", engine, get_args(Engine))
    if engine == "ray":
        refuse_without_ray()
    return engine


def refuse_replicas_elsewhere(engine: Engine, devices_per_replica: int) -> None:
    """Refuse replicas of several processes where no engine starts them.

    Raises:
        ValueError: For ``ray``.
    """
    if engine == "ray" and devices_per_replica > 1:
        raise ValueError(
            f"`devices_per_replica` must be 1 with `engine='ray'`, got {devices_per_replica}; use "
            "`engine='shared_memory'` for replicas of several processes."
        )


def refuse_device_elsewhere(engine: Engine, optimizer_device: str) -> None:
    """Refuse a device for the optimizers where they have none.

    Raises:
        ValueError: For ``ray``.
    """
    if engine == "ray" and torch.device(optimizer_device).type != "cpu":
        raise ValueError(
            f"`optimizer_device` must be 'cpu' with `engine='ray'`, got {optimizer_device!r}: shards of the parameters "
            "are actors without a device; use `engine='shared_memory'` for optimizers on a device."
        )


def run_on_engine(
    strategy: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    start_method: StartMethod,
    on_tick: Callable[[Statistics], None],
    on_failure: Callable[[Remains], None],
) -> tuple[Any, Ending]:
    """Run ``function(store, *args)`` in the workers of a strategy; see `run_workers`."""
    workers, settings = strategy.num_processes, strategy.settings
    if strategy.engine == "shared_memory":
        return run_workers(
            function,
            args,
            workers=workers,
            settings=settings,
            on_tick=on_tick,
            start_method=start_method,
            on_failure=on_failure,
            ranks=strategy.devices_per_replica,
        )
    from lightning_accel.async_sgd.ray_engine.run import run_on_ray

    share = float(strategy.root_device.type == "cuda") / strategy.workers_per_device
    options = replace(strategy.ray, gpus_per_worker=share)
    return run_on_ray(
        function,
        args,
        workers=workers,
        settings=settings,
        options=options,
        on_tick=on_tick,
        on_failure=on_failure,
    )


def devices_here(strategy: Any) -> list[torch.device] | None:
    """Return the devices of a worker's process: Ray shows each of its actors its own accelerators alone."""
    devices: list[torch.device] | None = strategy.parallel_devices
    if devices is None or strategy.engine == "shared_memory" or devices[0].type == "cpu":
        return devices
    return [torch.device(devices[0].type, 0)] * len(devices)
