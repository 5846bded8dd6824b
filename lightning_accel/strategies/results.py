"""What a `fit` in worker processes brings back into the Trainer of the process that called it."""

import pickle
from typing import Any

from torch import Tensor, nn

from lightning_accel.async_sgd.policy.optimizer_copy import copy_optimizers
from lightning_accel.async_sgd.policy.stepping import get_groups, set_groups
from lightning_accel.async_sgd.store import Opening
from lightning_accel.lightning_private import bring_back_progress
from lightning_accel.strategies.worker_process.made_layers import made_since, packed
from lightning_accel.strategies.worker_process.random_states import get_states, set_states


def collect(trainer: Any) -> dict[str, Any]:
    """Return progress, the callbacks' states and the loggers of the worker that coordinated in the end."""
    return {
        "fit_loop": trainer.fit_loop.state_dict(),
        "callbacks": {callback.state_key: callback.state_dict() for callback in trainer.callbacks},
        "loggers": pickled_loggers(trainer),
        "groups": _changed_groups(trainer),
        "schedules": [state_to_send(config.scheduler) for config in trainer.lr_scheduler_configs],
        "made": packed(trainer.lightning_module, _made_layers(trainer)),
        "trains": {name: p.requires_grad for name, p in trainer.lightning_module.named_parameters()},
        "buffers": _buffers_outside_state(trainer),
        "should_stop": trainer.should_stop,
        "logged": dict(trainer.logged_metrics),
        "shown": dict(trainer.progress_bar_metrics),
        "random": get_states() if trainer.strategy.num_processes == 1 else None,
    }


def _made_layers(trainer: Any) -> list[str]:
    """Return the layers that the module has made when the fit began, also one that had nothing to train."""
    strategy = trainer.strategy
    if strategy._session is not None and strategy._session.joined:
        made: list[str] = strategy._made
        return made
    return made_since(trainer.lightning_module, strategy._before)


def _changed_groups(trainer: Any) -> list[list[dict[str, Any]]]:
    """Return what schedules have made of the optimizers' hyper-parameters since the last push."""
    session = trainer.strategy._session
    if session is None or not session.joined:
        return [get_groups(optimizer) for optimizer in trainer.optimizers]
    return [session.worker.changed_groups(index) for index in range(len(session.worker.optimizers))]


def _buffers_outside_state(trainer: Any) -> dict[str, Tensor]:
    """Return the buffers that a state dict does not bring back: not persistent, new, or of another shape."""
    module, session = trainer.lightning_module, trainer.strategy._session
    saved = module.state_dict()
    known = session.worker.buffers if session is not None and session.joined else {}
    found = {}
    for name, buffer in module.named_buffers():
        before = known.get(name)
        same = before is not None and (before.shape, before.dtype) == (buffer.shape, buffer.dtype)
        if name not in saved or not same:
            found[name] = buffer.detach().cpu()
    return found


def bring_back_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Put buffers in place that no state dict carries, before one is loaded whose shapes must fit."""
    for name, value in buffers.items():
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        mine = getattr(part, leaf, None)
        if isinstance(mine, Tensor) and (mine.shape, mine.dtype, mine.layout) == (
            value.shape,
            value.dtype,
            value.layout,
        ):
            mine.detach().copy_(value)
        elif hasattr(part, leaf):
            setattr(part, leaf, value)
        else:
            part.register_buffer(leaf, value)


def bring_back(trainer: Any, collected: dict[str, Any]) -> None:
    """Load what `collect` returned: a second `fit`, a `test` and the caller's callbacks go on from there."""
    trainer.lightning_module.trainer = trainer  # as after any other fit
    bring_back_progress(trainer, collected["fit_loop"])
    load_callbacks(trainer, collected["callbacks"])
    trainer.should_stop = collected["should_stop"]
    trainer.logged_metrics.update(collected["logged"])
    trainer.progress_bar_metrics.update(collected["shown"])
    trainer.strategy._ended_schedules = collected["schedules"]
    for name, parameter in trainer.lightning_module.named_parameters():  # callbacks may have frozen or thawed some
        parameter.requires_grad_(collected["trains"].get(name, parameter.requires_grad))
    if collected["random"] is not None:  # one worker has drawn what a plain fit would have drawn here
        set_states(collected["random"])
    follow_loggers(trainer, collected["loggers"])


def state_to_send(scheduler: Any) -> dict[str, Any]:
    """Return the state of a scheduler without what cannot be pickled, such as a function that its class sets anew."""
    state: dict[str, Any] = scheduler.state_dict()
    return {key: value for key, value in state.items() if _can_be_pickled(value)}


def _can_be_pickled(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # whatever it is, it cannot go
        return False
    return True


def load_callbacks(trainer: Any, states: dict[str, dict[str, Any]]) -> None:
    """Give the callbacks of the caller's Trainer, which were never set up, the states that the workers' came to."""
    for callback in trainer.callbacks:
        if not (state := states.get(callback.state_key)):
            continue
        if getattr(callback, "dirpath", "") is None:
            callback.dirpath = state.get("dirpath")  # resolved there; paths of another folder are not taken
        callback.load_state_dict(state)


def pickled_loggers(trainer: Any) -> list[bytes | None]:
    """Return the loggers as they are, None for each that cannot be pickled."""
    pickled: list[bytes | None] = []
    for logger in trainer.loggers:
        try:
            pickled.append(pickle.dumps(logger))
        except Exception:  # noqa: PERF203  # a logger of any make may hold anything
            pickled.append(None)
    return pickled


def follow_loggers(trainer: Any, pickled: list[bytes | None]) -> None:
    """Let this process's loggers go on where those of another process stopped, in the same run and the same files.

    A logger that began anew would open a second run, and `CSVLogger` would delete what the first one has written.
    """
    for logger, state in zip(trainer.loggers, pickled, strict=False):
        if state is not None:
            vars(logger).update(vars(pickle.loads(state)))


def bring_back_optimizers(trainer: Any, state: Opening | None, groups: list[list[dict[str, Any]]]) -> None:
    """Give the caller's Trainer the server's optimizers, with their states, over the parameters of its own module.

    Args:
        trainer: The caller's.
        state: Of the server, at the end.
        groups: Hyper-parameters of each optimizer that schedules have changed since.
    """
    parameters = dict(trainer.lightning_module.named_parameters())
    if state is None or list(parameters) != state.names:
        return
    mine: dict[int, Tensor] = {id(v): parameters[name] for name, v in zip(state.names, state.parameters, strict=True)}
    optimizers = copy_optimizers(state.optimizers, mine)
    for optimizer, values in zip(optimizers, groups, strict=True):
        set_groups(optimizer, values)
    trainer.strategy.optimizers = optimizers
