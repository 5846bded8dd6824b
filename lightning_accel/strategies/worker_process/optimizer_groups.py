"""Parameter groups that come while asynchronous workers train: finetuning callbacks thaw layer after layer.

Every worker's callbacks add the same groups to its own optimizer, each at its own time. The server goes on with those
of the coordinator.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.async_sgd import Snapshot, Worker
from lightning_accel.async_sgd.optimizer_steps import take_state


def layout(optimizers: Sequence[Optimizer]) -> list[list[int]]:
    """Return how many parameters each group of each optimizer has."""
    return [[len(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]


def layout_of_server(cut: Snapshot) -> list[list[int]]:
    """Return the same for the optimizers of a server."""
    return [[len(group["params"]) for group in state["param_groups"]] for state in cut.optimizer_states]


def autocast_of_steps(trainer: Any) -> torch.dtype | None:
    """Return the type that a Trainer's optimizer steps are cast to; None where they are not.

    In manual optimization a step is made inside `training_step`, and so under what the precision casts that to.
    """
    if trainer.lightning_module.automatic_optimization or trainer.strategy.root_device.type != "cpu":
        return None
    with trainer.precision_plugin.train_step_context():
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def follow_groups(worker: Worker, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor]) -> None:
    """Go on with groups that were added to a worker's optimizers, all together if it coordinates.

    Args:
        worker: Whose optimizers they are.
        parameters: Of its module, by name.
        buffers: Of its module, by name.

    Raises:
        ValueError: If groups were changed, and not only added.
    """
    store = worker.store
    worker.send_changes()
    worker.flush()
    if store.is_coordinator:
        cut = store.hold()
        try:
            worker.load(cut)
            if not worker.settings.local_steps:
                _take_states(worker, cut)
            worker.follow(parameters, buffers)
        except BaseException:
            store.let_go()
            raise
        store.exchange(worker.opening(version=cut.version, steps=cut.steps))
    else:
        worker.follow(parameters, buffers)
    worker.begin()


def _take_states(worker: Worker, cut: Snapshot) -> None:
    """Give a worker's optimizers, which have more groups by now, the states that the server's have."""
    for optimizer, mine, theirs, state in zip(
        worker.optimizers, layout(worker.optimizers), layout_of_server(cut), cut.optimizer_states, strict=True
    ):
        if mine[: len(theirs)] != theirs:
            raise ValueError(
                f"the parameter groups of {type(optimizer).__name__} had {theirs} parameters, and have {mine}: groups "
                "may be added while asynchronous workers train, not changed; use a strategy that waits, such as `ddp`."
            )
        take_state(optimizer)
        held: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        for number, values in state["state"].items():
            optimizer.state[held[number]] = values


def thaw_again(trainer: Any, epochs: range) -> None:
    """Let finetuning callbacks of a process that was started again do what they did in epochs which lie behind."""
    for callback in trainer.callbacks:
        thaw = getattr(callback, "finetune_function", None)
        if not callable(thaw) or not hasattr(callback, "freeze_before_training"):
            continue
        for epoch in epochs:
            for optimizer in trainer.optimizers:
                thaw(trainer.lightning_module, epoch, optimizer)
