"""What Lightning asks of all processes at once, for workers that do not wait for each other."""

import pickle
import traceback
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor

from lightning_accel.async_sgd import ParameterStore
from lightning_accel.strategies.worker_process.random_states import set_up_alike


class NobodyWaits:
    """Barriers, broadcasts and reductions of a strategy whose workers go on alone, on one machine."""

    distribution: ClassVar[str]
    _store: ParameterStore | None
    _trainer: Any
    _broadcasts: dict[str, int]

    @property
    def num_nodes(self) -> int:
        """Number of machines: one."""
        return 1

    @num_nodes.setter
    def num_nodes(self, nodes: int) -> None:
        if nodes != 1:
            error = import_module(f"{self.distribution}.utilities.exceptions").MisconfigurationException
            raise error(
                f"`num_nodes` must be 1 with `async_sgd`, got {nodes}: its engine works on one machine, and each "
                "machine would train a model of its own; use `devices` for more workers, or DDP for several machines."
            )

    def barrier(self, name: str | None = None) -> None:
        """Wait for the coordinator's ``prepare_data`` before ``setup``; else do nothing, workers do not wait."""
        if name == "pre_setup" and self._store is not None and self._trainer.state.fn == "fit":
            set_up_alike(self._trainer, self._store)

    def broadcast(self, obj: Any, src: int = 0) -> Any:  # noqa: ARG002
        """Return what the first caller from this line of code, for the n-th time, gave; nobody waits."""
        if self._store is None:
            return obj
        # workers do not make the same calls, so the call is named by where it comes from
        frame = traceback.extract_stack(limit=2)[0]
        place = f"{frame.filename}:{frame.lineno}"
        self._broadcasts[place] = self._broadcasts.get(place, 0) + 1
        first = self._store.kv(f"{place}:{self._broadcasts[place]}", pickle.dumps(obj))
        return obj if first is None else pickle.loads(first)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:  # noqa: ARG002
        """Return this worker's own value."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: ARG002
        """Return this worker's own decision; those that count are the coordinator's."""
        return decision

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:  # noqa: ARG002
        """Return ``tensor`` in an evaluation, which one process makes alone.

        Raises:
            RuntimeError: In training, where the others are somewhere else.
        """
        if self._trainer is not None and self._trainer.training:
            raise RuntimeError(
                "`all_gather` in training waits for all workers, and asynchronous workers do not wait; "
                "gather in validation, or use another strategy."
            )
        return tensor
