"""Training data by leases: a DataLoader that asks the parameter server which batch is next."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_accel.async_sgd import Lease
from lightning_accel.async_sgd.policy.leases import LeaseId
from lightning_accel.strategies.worker_process.shared_epochs import UnitsOfEpoch


class Share(Protocol):
    """Who leases batches for this worker and knows which it has in hand, see `SharedEpochs`."""

    in_hand: list[LeaseId]

    def take(self, units: UnitsOfEpoch) -> list[Lease] | None:
        """Lease the next block; None where this loader is not leased."""
        ...

    def begin_anew(self, loading: Sequence[LeaseId]) -> None:
        """Give back what is in hand, and what was ``loading``."""
        ...

    def loading(self, busy: bool) -> None:
        """Take note that a batch is being loaded, or has been."""
        ...

    def check_asked(self, loader: str, asked: bool) -> None:
        """Refuse a loader whose batches nobody has asked for as workers share them out."""
        ...


class LeasedOrder:
    """Stands where a DataLoader has its (batch) sampler and yields units as the server leases them.

    The order of an epoch is what the user's own sampler gives the one worker that is asked for it.
    """

    def __init__(self, order: Iterable[Any], share: Share) -> None:
        self.order = order
        self.sampler = getattr(order, "sampler", order)  # Lightning calls its `set_epoch`
        self.given: deque[LeaseId] = deque()  # leases of batches that are being loaded, oldest first
        self.asked = False  # whether a loader has asked for anything
        self._next: deque[Lease] = deque()  # leased, and not yet asked for
        self._share = share

    def __len__(self) -> int:
        """Units of the whole epoch, all workers together."""
        return len(self.order)  # type: ignore[arg-type]  # a sampler without a length raises as it always does

    def __iter__(self) -> Iterator[Any]:
        units = UnitsOfEpoch(self.order)
        self.asked = True
        block = self._share.take(units)
        if block is None:
            yield from self.order
            return
        while block:
            self._next = waiting = deque(block)
            while waiting:
                lease = waiting.popleft()
                self.given.append(lease.id)
                yield lease.unit
            block = self._share.take(units)

    def begin_anew(self) -> list[LeaseId]:
        """Forget what is leased and not yet handed out; returns it, in order."""
        forgotten = [*self.given, *(lease.id for lease in self._next)]
        self.given.clear()
        self._next.clear()
        return forgotten


def lease_batches(loader: DataLoader, share: Share, *, eager: bool) -> DataLoader:
    """Return a copy of ``loader`` whose batches are leased; the user's own object stays as it is.

    Args:
        loader: Over a map-style dataset.
        share: Leases the batches, and is told of each that is handed out, in order.
        eager: Whether iterating makes the DataLoader's iterator at once, as a plain loader does, with its draw from
            the global random state. Otherwise with the first batch, for loaders whose processes ask for indices early.

    Raises:
        ValueError: If the data cannot be leased.
    """
    refuse_unleasable(loader)
    batched = loader.batch_sampler is not None
    order = LeasedOrder(loader.batch_sampler if batched else loader.sampler, share)  # type: ignore[arg-type]
    leased = copy.copy(loader)
    # a DataLoader forbids setting this after construction, to keep its parts in step; ours stands for the same part
    object.__setattr__(leased, "batch_sampler" if batched else "sampler", order)
    object.__setattr__(leased, "_iterator", None)
    object.__setattr__(leased, "__class__", _leased_class(type(loader), order, share, eager=eager))
    return leased


def lease_training_data(dataloader: Any, share: Share, *, alone: bool) -> Any:
    """Return a leased copy of a training loader; with one worker, what cannot be leased comes back as it is.

    Args:
        dataloader: What the user trains on.
        share: See `lease_batches`.
        alone: Whether there is one worker only.

    Raises:
        ValueError: If several workers cannot share the data out.
    """
    try:
        if not isinstance(dataloader, DataLoader):
            raise ValueError(
                f"{type(dataloader).__name__} is no torch DataLoader, so its data cannot be shared out among "
                "workers; pass a DataLoader over a map-style dataset, or use `devices=1`."
            )
        refuse_unleasable(dataloader)
    except ValueError:
        if alone:
            return dataloader
        raise
    return lease_batches(dataloader, share, eager=alone and dataloader.num_workers == 0)


def refuse_unleasable(loader: DataLoader) -> None:
    """Refuse data that cannot be shared out by index.

    Raises:
        ValueError: For an iterable dataset or a sampler that already splits the data between processes.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "an IterableDataset has no indices to share out among workers: every worker would see all of it; "
            "use a map-style dataset, or `devices=1`."
        )
    if isinstance(getattr(loader.batch_sampler, "sampler", loader.sampler), DistributedSampler):
        raise ValueError(
            "a DistributedSampler gives each process a fixed part, which is lost if that process dies; "
            "pass the plain sampler (or `shuffle=True`): the strategy shares the data out itself."
        )


def _leased_class(base: type[DataLoader], order: LeasedOrder, share: Share, *, eager: bool) -> type[DataLoader]:
    def iterate(self: DataLoader) -> Iterator[Any]:
        share.begin_anew(order.begin_anew())  # what an iterator before this one has leased is not trained on
        return hand_out(base.__iter__(self) if eager else None, self)

    def stay(self: DataLoader, state_dict: Any) -> None:  # the loader's own signature
        pass

    def hand_out(made: Iterator[Any] | None, loader: DataLoader) -> Iterator[Any]:
        batches = base.__iter__(loader) if made is None else made
        while True:
            share.loading(True)
            try:
                batch = next(batches)
            except StopIteration:
                share.check_asked(base.__name__, order.asked)
                return
            finally:
                share.loading(False)
            share.check_asked(base.__name__, order.asked)
            if order.given:
                share.in_hand.append(order.given.popleft())
            yield batch

    members: dict[str, Any] = {"__iter__": iterate, "__module__": base.__module__}
    if hasattr(base, "load_state_dict"):
        members["load_state_dict"] = stay  # a loader that goes on by itself would skip batches that were leased anew
    return type(base.__name__, (base,), members)
