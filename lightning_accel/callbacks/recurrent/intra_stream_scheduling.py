"""Run recurrent layers with intra-stream schedules while training."""

# ruff: noqa: ARG002  # Lightning fixes the hooks' arguments

from contextlib import ExitStack
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from lightning_accel.arguments import check_choice, check_switch
from lightning_accel.callbacks.recurrent.scheduled_layers import ScheduledLayers
from lightning_accel.decision_line import say_decision
from lightning_accel.recurrent.schedule_choice import SCHEDULES


class IntraStreamScheduling(Callback):
    """Run only the loops of recurrent layers step by step, in modules that know nothing of it.

    Acts on `Recurrent` and `GraphRNN` layers, on ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` that get packed sequences on
    CPU, and on Python loops over a cell in the model's own ``forward``. Parameters, state-dict keys and results stay;
    the model is as it was when the fit ends. The first training step is watched and runs plain; every schedule is
    verified against the plain loop and used where it measures faster. What was chosen is part of the checkpoint, so a
    resumed run repeats it.

    Args:
        schedule: ``"auto"`` measures; ``"loop"`` changes nothing; ``"intra_stream"``, ``"compiled"``, ``"scan"`` and
            ``"native"`` are used wherever they can be. A `Recurrent` layer's own schedule goes first.
        packed: Whether packed sequences run padded.
        deferred_cells: Whether Python loops over cells are recorded and run with schedules.

    Raises:
        TypeError: If ``packed`` or ``deferred_cells`` is not True or False.
        ValueError: If ``schedule`` is unknown.
        MisconfigurationException: After the first training step, if the model has no recurrent layer.

    References:
        Hwang, Sung, "Single Stream Parallelization of Generalized LSTM-like RNNs", arXiv:1503.02852. *Deviations*: see
        `lightning_accel.recurrent`.
    """

    def __init__(
        self,
        schedule: Literal["auto", "loop", "intra_stream", "compiled", "scan", "native"] = "auto",
        *,
        packed: bool = True,
        deferred_cells: bool = True,
    ) -> None:
        super().__init__()
        check_choice("schedule", schedule, SCHEDULES)
        check_switch("packed", packed)
        check_switch("deferred_cells", deferred_cells)
        self.schedule: Literal["auto", "loop", "intra_stream", "compiled", "scan", "native"] = schedule
        self.packed, self.deferred_cells = packed, deferred_cells
        self.report: list[str] = []
        self._layers: ScheduledLayers | None = None
        self._step = ExitStack()
        self._saved: dict[str, Any] = {}
        self._resumed = False  # the next fit goes on with what was saved; another fit may have another model
        self._seen_a_step = False

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Attach the schedules; layers that were made late exist now."""
        self._leave()
        self.report, self._seen_a_step = [], False
        self._layers = ScheduledLayers(
            pl_module,
            schedule=self.schedule,
            packed=self.packed,
            deferred_cells=self.deferred_cells,
            calls_left=max(trainer.estimated_stepping_batches - trainer.global_step, 0),
        )
        if self._resumed:
            self._layers.restore(self._saved)
        self._resumed = False

    def on_train_batch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        """Record the cells' calls in this step."""
        if self._layers is not None:
            self._step.enter_context(self._layers.training_step())

    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        """Let the calls be as they were; say after the first step what was found."""
        self._step.close()
        if self._layers is None:
            return
        self._saved = self._layers.state()
        if not self._seen_a_step:
            self._seen_a_step = True
            if self._layers.found_nothing and self.schedule != "loop":
                self._leave()
                raise MisconfigurationException(
                    f"IntraStreamScheduling found no recurrent layer in {type(pl_module).__name__}: no Recurrent, "
                    "GraphRNN, nn.LSTM, nn.GRU or nn.RNN, and no module that was called in a loop with its own result; "
                    "remove the callback."
                )

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Say what ran how and leave the model as it was."""
        if self._layers is not None:
            self.report = self._layers.report()
            say_decision(trainer, "IntraStreamScheduling", "; ".join(self.report) or "no recurrent layer ran.")
        self._leave()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Leave the model as it was."""
        self._leave()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Leave the model as it was."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Return what was chosen."""
        return dict(self._saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Repeat what was chosen."""
        self._saved, self._resumed = dict(state_dict), bool(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the running fit."""
        return self.__dict__ | {"_layers": None, "_step": ExitStack()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntraStreamScheduling":
        """Copy the settings and what was chosen."""
        twin = type(self)(self.schedule, packed=self.packed, deferred_cells=self.deferred_cells)
        twin._saved, twin._resumed = dict(self._saved), self._resumed
        return twin

    def _leave(self) -> None:
        self._step.close()
        if self._layers is not None:
            self._layers.remove()
            self._layers = None
