"""Checkpoints of an asynchronous run: ordinary Lightning files, of one cut of the server's state."""

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightning_accel.strategies.rescue import Rescue
from lightning_accel.strategies.worker_process.session import Session

if TYPE_CHECKING:  # the real base comes from the distribution at hand
    from lightning.pytorch.strategies import ParallelStrategy as _Base
else:
    _Base = object

_CHECKPOINT_KEY = "async_sgd"


class SavesOneCut(_Base):
    """What of a strategy's state goes into a checkpoint, and what comes back out of one."""

    rescue: Rescue | None
    _session: Session | None
    _resumed: dict[str, Any]
    _ended_schedules: list[dict[str, Any]]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's state with the server's parameters and buffers, of one cut with the optimizers."""
        state: dict[str, Any] = super().lightning_module_state_dict()
        if self._session is None or not self._session.joined:
            return state
        return self._session.model_state(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the server's state of an optimizer, of the same cut as the module's state."""
        state: dict[str, Any] | None = None
        if self._session is not None and self._session.joined:
            state = self._session.optimizer_state(optimizer)
        return super().optimizer_state(optimizer) if state is None else state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write an ordinary checkpoint; unfinished epochs go under a key that a plain Trainer does not read."""
        if self._session is not None and self._session.joined:
            unfinished = self._session.unfinished_epochs(checkpoint)
        else:
            unfinished = None if self.rescue is None else self.rescue.complete(checkpoint)
            if self._ended_schedules and "lr_schedulers" in checkpoint:  # the schedulers themselves were the workers'
                checkpoint["lr_schedulers"] = self._ended_schedules
        if unfinished is not None:
            checkpoint[_CHECKPOINT_KEY] = unfinished
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, of this or any other strategy."""
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        self._resumed = dict(checkpoint.pop(_CHECKPOINT_KEY, {}))
        return checkpoint
