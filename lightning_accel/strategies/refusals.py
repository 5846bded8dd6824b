"""What workers that do not wait for each other cannot do, refused before training starts."""

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_accel.async_sgd.replicas.shards import is_spread
from lightning_accel.lightning_private import sync_batch_norm_requested

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of Open MPI, and of MPICH and its kin; set without mpi4py, too


def refuse_lock_step(strategy: Any, module: nn.Module) -> None:
    """Refuse whatever makes workers wait for each other in every batch.

    Raises:
        MisconfigurationException: For synchronized batch norm, and where a default process group exists.
    """
    error = import_module(f"{strategy.distribution}.utilities.exceptions").MisconfigurationException
    synchronized = [n for n, m in module.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if synchronized or sync_batch_norm_requested(strategy):
        raise error(
            "synchronized batch norm waits for all workers in every forward pass, and asynchronous workers do not "
            f"wait ({', '.join(synchronized) or 'sync_batchnorm=True'}); use plain batch norm: `buffers='mean'` "
            "averages its statistics."
        )
    alone = strategy.devices_per_replica == 1  # the ranks of a replica are such a group, and go in step
    if alone and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise error(
            "a default process group exists: Lightning would synchronize all workers in every batch; do not call "
            "`torch.distributed.init_process_group` with this strategy."
        )


def refuse_uninitialized(strategy: Any, module: nn.Module) -> None:
    """Refuse lazy layers that have no shape when training begins: the server must know what it is going to hold.

    Raises:
        MisconfigurationException: If there are some.
    """
    lazy = [name for name, value in [*module.named_parameters(), *module.named_buffers()] if is_lazy(value)]
    if lazy:
        error = import_module(f"{strategy.distribution}.utilities.exceptions").MisconfigurationException
        raise error(
            f"`{lazy[0]}` has no shape yet, and asynchronous workers share parameters before the first batch: pass a "
            "batch through the lazy layers in `setup`."
        )


def refuse_parameters_in_one_place(strategy: Any, module: nn.Module) -> None:
    """Refuse two parameters that share memory: workers and server hold each by itself, and would let them part.

    Raises:
        MisconfigurationException: If there are some.
    """
    places: dict[tuple[torch.device, int], str] = {}
    for name, parameter in module.named_parameters():
        if is_lazy(parameter) or not parameter.numel() or parameter.is_meta or is_spread(parameter):
            continue
        if (other := places.setdefault((parameter.device, parameter.data_ptr()), name)) != name:
            error = import_module(f"{strategy.distribution}.utilities.exceptions").MisconfigurationException
            raise error(
                f"`{other}` and `{name}` are two parameters in one place of memory, and asynchronous workers hold each "
                "by itself; make them one parameter, or compute one from the other in `forward`."
            )


def refuse_other_launchers(strategy: Any) -> None:
    """Refuse processes that somebody else has started: each would train a model of its own.

    Raises:
        MisconfigurationException: Where torchrun, SLURM or MPI has started this process as one of several.
    """
    environment = strategy.cluster_environment
    started = environment is not None and environment.creates_processes_externally and environment.world_size() > 1
    # torchrun's names, also where its environment is not recognised; Lightning itself never sets `RANK`
    started |= "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    mpi = [name for name in _MPI_SIZES if os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1]
    if not started and not mpi:
        return
    name = type(environment).__name__ if started else f"MPI: {mpi[0]}={os.environ[mpi[0]]}"
    error = import_module(f"{strategy.distribution}.utilities.exceptions").MisconfigurationException
    raise error(
        f"this process is one of several that a launcher has started ({name}), and each would train a model of its "
        "own: `async_sgd` starts its workers itself. Start the script once (one task, no torchrun, no mpirun), and say "
        "`devices=` how many workers there are to be."
    )


def refuse_tuning_callbacks(strategy: Any, callbacks: Sequence[Any]) -> None:
    """Refuse callbacks that train on their own when a fit begins, which every worker would do for itself.

    Raises:
        MisconfigurationException: For `LearningRateFinder` and `BatchSizeFinder`.
    """
    known = import_module(f"{strategy.distribution}.callbacks")
    ways = {known.LearningRateFinder: "lr_find", known.BatchSizeFinder: "scale_batch_size"}
    for callback in callbacks:
        if (way := next((way for kind, way in ways.items() if isinstance(callback, kind)), None)) is not None:
            error = import_module(f"{strategy.distribution}.utilities.exceptions").MisconfigurationException
            raise error(
                f"`{type(callback).__name__}` trains when a fit begins, and every asynchronous worker would do so for "
                f"itself, with another result; leave it out and call `Tuner(trainer).{way}(model)` before `fit`."
            )
