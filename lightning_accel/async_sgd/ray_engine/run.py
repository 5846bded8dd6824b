"""Run workers on Ray around a head and shards, from the process that wants the result."""

import logging
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_accel.async_sgd.ray_engine.cluster import connected
from lightning_accel.async_sgd.ray_engine.head import Head
from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.async_sgd.ray_engine.shards.layout import merge
from lightning_accel.async_sgd.ray_engine.whereabouts import Whereabouts
from lightning_accel.async_sgd.ray_engine.worker_actor import Errand
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.memory import anonymous_file
from lightning_accel.async_sgd.shared_memory.supervisor import Ending, Remains, WorkerFailedError
from lightning_accel.async_sgd.shared_memory.unpicklable import what_cannot_be_pickled
from lightning_accel.async_sgd.store import Opening, Snapshot, Statistics

_LOOK_SECONDS = 0.25
_END_SECONDS = 60.0


def run_on_ray(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    *,
    workers: int,
    settings: Settings,
    options: RayOptions,
    on_tick: Callable[[Statistics], None] | None = None,
    on_failure: Callable[[Remains], None] | None = None,
) -> tuple[Any, Ending]:
    """Run ``function(store, *args)`` in ``workers`` actors around parameter shards; see `run_workers`.

    Args:
        function: Joins the ``store``, trains, and returns.
        args: What Ray's pickler takes.
        workers: How many, >= 1.
        settings: Of the run.
        options: Of the engine.
        on_tick: Called about four times a second with the statistics, to show them.
        on_failure: Called with what the shards have when the run does not end well, before the exception (or Ctrl-C)
            goes on to the caller.

    Returns:
        What the coordinator returned, and how the run ended.

    Raises:
        ValueError: If a number is out of its range.
        ModuleNotFoundError: If Ray is not installed.
        WorkerFailedError: If a worker raised.
        RuntimeError: If all of them died for good, or the cluster has no token.
    """
    if workers < 1:
        raise ValueError(f"`workers` must be >= 1, got {workers}.")
    settings.check_workers(workers)
    with connected(options, cores=workers * options.cpus_per_worker) as ray:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.put(_packed(function, args))
        node = ray.get_runtime_context().get_node_id()
        place = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        actor = ray.remote(Head).options(num_cpus=0, max_restarts=0, scheduling_strategy=place, max_concurrency=1000)
        head = actor.remote(workers, settings, options, Errand([task], Whereabouts.here()), node)
        found: dict[str, Any] = {}
        try:
            running = head.run.remote()
            while not ray.wait([running], timeout=_LOOK_SECONDS)[0]:
                _look(ray.get(head.look.remote()), on_tick)
            found = ray.get(running)
            _look(ray.get(head.look.remote()), on_tick)
        except BaseException as error:
            _after_failure(ray, head, running, on_failure)
            if isinstance(error, ray.exceptions.RayActorError):
                raise RuntimeError(
                    "the head of the run on Ray is gone, and with it what was decided last; resume from the last "
                    "checkpoint with `fit(ckpt_path=...)`."
                ) from error
            raise
        finally:
            ray.kill(head)
    return _ended(found, on_failure)


def _look(seen: tuple[Any, list[tuple[str, int, str]]], on_tick: Callable[[Statistics], None] | None) -> None:
    statistics, said = seen
    for name, level, text in said:
        logging.getLogger(name).log(level, text)
    if on_tick is not None and statistics is not None:
        on_tick(statistics)


def _packed(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    from ray import cloudpickle

    try:
        packed: bytes = cloudpickle.dumps((function, args))
    except Exception as error:
        named = next(filter(None, map(what_cannot_be_pickled, [*reversed(args), function])), None)
        if named is None:
            raise
        raise TypeError(
            f"`{named}` cannot be pickled, and model, data and callbacks go to worker processes by pickle; make it in "
            "a hook that runs there, such as `setup` or `train_dataloader`, or leave it out in `__getstate__`."
        ) from error
    return packed


def _after_failure(ray: Any, head: Any, running: Any, on_failure: Callable[[Remains], None] | None) -> None:
    if on_failure is None:
        return
    try:
        ray.get(head.stop.remote(), timeout=_END_SECONDS)
        remains = _remains(ray.get(running, timeout=_END_SECONDS))
    except ray.exceptions.RayError:
        remains = Remains(None, Statistics(), {}, [])
    on_failure(remains)


def _ended(found: dict[str, Any], on_failure: Callable[[Remains], None] | None) -> tuple[Any, Ending]:
    if "result" not in found:
        if on_failure is not None:
            on_failure(_remains(found))
        if "failed" in found:
            try:
                cause = pickle.loads(found["cause"])
            except Exception:  # an exception that pickles need not unpickle
                cause = None
            raise WorkerFailedError(found["failed"]) from cause
        raise RuntimeError(found["error"])
    state = _state(found)
    file = None
    if "file" in found:
        file = anonymous_file()
        with os.fdopen(os.dup(file), "wb") as writer:
            writer.write(found["file"])
    cut = None if state is None else cut_of(state)
    ending = Ending(found["result"], cut, found["statistics"], found["log"], state, file)
    return pickle.loads(ending.result), ending


def _remains(found: dict[str, Any]) -> Remains:
    return Remains(_state(found), found.get("statistics", Statistics()), found["kv"], found["log"])


def _state(found: dict[str, Any]) -> Opening | None:
    if found["head"] is None:
        return None
    head: Opening = pickle.loads(found["head"])
    parts: list[Opening] = [pickle.loads(part) for part in found["parts"]]
    whole = merge(parts, found["layout"], found["order"])
    return replace(head, names=whole.names, parameters=whole.parameters, optimizers=whole.optimizers)


def cut_of(state: Opening) -> Snapshot:
    """Return a server's state as one cut, which shares no memory with it."""
    copied: Opening = pickle.loads(pickle.dumps(replace(state, optimizers=[])))
    return Snapshot(
        version=state.version,
        steps=list(state.steps),
        parameters=[p.detach() for p in copied.parameters],
        buffers=copied.buffers,
        optimizer_states=[pickle.loads(pickle.dumps(optimizer.state_dict())) for optimizer in state.optimizers],
        epochs=copied.epochs,
    )
