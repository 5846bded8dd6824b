"""Checkpoints of an asynchronous run as a plain Trainer writes them: one cut, and loops that count for all workers."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from lightning_accel.async_sgd import Snapshot, Worker
from lightning_accel.async_sgd.replicas.shards import local


def with_values_of(cut: Snapshot, state: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Return a module's state dict with the parameters and shared buffers of a cut in the place of the worker's own.

    Entries are told by the memory they lie in, so tied parameters and keys that hooks have renamed are found as well.
    """
    mine: list[Tensor] = list(worker.parameters.values())
    theirs = cut.parameters
    shared = worker.shared_buffers(cut)
    mine, theirs = [*mine, *(own for own, _ in shared)], [*theirs, *(value for _, value in shared)]
    fresh = {(local(t).data_ptr(), t.shape): value for t, value in zip(mine, theirs, strict=True) if t.numel()}
    for key, value in state.items():  # in place: a state dict carries metadata
        if isinstance(value, Tensor):
            state[key] = fresh.get((local(value).data_ptr(), value.shape), value)
    return state


class HasEpochs(Protocol):
    """A cut or a server's state: its unfinished epochs, see `LeaseBook.state`."""

    epochs: list[dict[str, Any]]


def rewind_loops(
    checkpoint: dict[str, Any], cut: HasEpochs, *, pending: int, batches: float, alone: bool = False
) -> dict[str, Any]:
    """Make the loops of a checkpoint count the batches of all workers, so that a plain Trainer resumes right.

    Args:
        checkpoint: As Lightning dumped it in the coordinator; its batch progress is changed in place.
        cut: What the checkpoint holds.
        pending: Batches of the coordinator whose gradients are not yet pushed (accumulation).
        batches: Of an epoch.
        alone: Whether there is one worker only, whose loader so knows where all have come to.

    Returns:
        The unfinished epochs, for a resumed asynchronous run.
    """
    if not alone:
        checkpoint["loops"]["fit_loop"].get("state_dict", {}).pop("combined_loader", None)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    epoch = checkpoint["epoch"]
    known = {state["epoch"]: state for state in cut.epochs}
    if known:
        # an epoch that is no longer known is complete
        done = len(known[epoch]["done"]) if epoch in known else min(batches, progress["current"]["processed"])
        missing = int(done) + pending - progress["current"]["processed"]
        for tracker in (progress["current"], progress["total"]):
            for count in ("ready", "started", "processed", "completed"):
                tracker[count] += missing
    # one whose order is not known to its end begins anew, as any loader does that keeps no state
    known_to_the_end = [state for state in cut.epochs if state.get("complete", True)]
    unfinished = [state for state in known_to_the_end if len(state["done"]) < len(state["units"])]
    return {"epochs": [state for state in unfinished if _is_plain(state["units"])]}


def _is_plain(units: Any) -> bool:
    """Whether units are numbers or lists of numbers, which a checkpoint may hold without trusting its author."""
    if isinstance(units, Mapping):
        return False
    return all(type(u) is int or (isinstance(u, list) and all(type(i) is int for i in u)) for u in units)
