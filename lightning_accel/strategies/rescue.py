"""What was trained comes into the caller's module although the run did not end well: an exception, or Ctrl-C."""

import pickle
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from lightning_accel.async_sgd.policy.stepping import get_groups
from lightning_accel.async_sgd.shared_memory.supervisor import Remains
from lightning_accel.async_sgd.store import Opening
from lightning_accel.lightning_private import bring_back_progress, count_steps_of_others, go_into_epoch
from lightning_accel.strategies.results import bring_back_optimizers, load_callbacks
from lightning_accel.strategies.worker_process.checkpoints import rewind_loops
from lightning_accel.strategies.worker_process.coordination import PROGRESS_KEY
from lightning_accel.strategies.worker_process.made_layers import put_announced


class Rescue:
    """Bring the server's state into a Trainer whose workers are gone, before any handler of the caller's runs.

    Parameters, buffers and optimizers are the server's last ones. How far the loops are is what the coordinator said
    last, half a second ago at most, with the counts of the server.

    Args:
        trainer: The caller's.
        remains: Of the run.
    """

    def __init__(self, trainer: Any, remains: Remains) -> None:
        self.remains = remains
        self._trainer = trainer
        self._state = remains.state
        published = remains.kv.get(PROGRESS_KEY)
        self._progress: dict[str, Any] | None = None if published is None else pickle.loads(published)
        strategy = trainer.strategy
        strategy.statistics = remains.statistics
        if self._state is None:
            return
        put_announced(trainer.lightning_module, remains.kv)
        load_values(trainer.lightning_module, self._state)
        if self._progress is not None:
            self._restore_progress(self._progress, self._state)
        if not strategy.settings.local_steps:  # else each worker's optimizer has a state of its own
            groups = [get_groups(optimizer) for optimizer in self._state.optimizers]
            bring_back_optimizers(trainer, self._state, groups)

    def _restore_progress(self, progress: dict[str, Any], state: Opening) -> None:
        trainer, settings = self._trainer, self._trainer.strategy.settings
        trainer.lightning_module.trainer = trainer  # as after any other fit
        bring_back_progress(trainer, progress["fit_loop"])
        trainer.callback_metrics.update(progress["metrics"])
        load_callbacks(trainer, progress["callbacks"])
        steps = state.version if settings.local_steps else sum(state.steps)
        made = (steps - progress["steps"]) * max(settings.n_push, settings.local_steps)
        count_steps_of_others(trainer, progress["global_step"] + max(0, made) - trainer.global_step)
        under_way = [known["epoch"] for known in state.epochs if len(known["done"]) < len(known["units"])]
        if under_way and under_way[0] > trainer.current_epoch:
            go_into_epoch(trainer, under_way[0], batches=progress["batches"])

    def complete(self, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
        """Add to a checkpoint of the caller's what only the workers had; returns what a resumed run needs beside it."""
        if self._state is None or self._progress is None:
            return None
        checkpoint["lr_schedulers"] = [state for _, state in self._progress["lr_schedulers"]]
        alone = self._trainer.strategy.num_processes == 1
        return rewind_loops(checkpoint, self._state, pending=0, batches=self._progress["batches"], alone=alone)


@torch.no_grad()
def load_values(module: Any, state: Opening) -> None:
    """Copy the server's parameters and buffers into a module, whose layers may have been exchanged in the workers."""
    values = dict(zip([*state.names, *state.buffer_names], [*state.parameters, *state.buffers], strict=True))
    here = dict(module.named_parameters()) | dict(module.named_buffers())
    if any(name not in here for name in state.names):
        module.load_state_dict({name: value.detach() for name, value in values.items()}, strict=False)
        here = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in values.items():
        if name in here and not is_lazy(here[name]) and here[name].shape == value.shape:
            here[name].copy_(value.detach())
