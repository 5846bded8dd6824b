"""Sequential freezing as a Lightning callback."""

import time
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_accel.callbacks.layer_exchange.recorded_inputs import RunningOrder
from lightning_accel.callbacks.layer_exchange.structure import ChangesStructure, refuse_sharded, refuse_sharded_states
from lightning_accel.callbacks.order import correct_order
from lightning_accel.callbacks.sequential_freezing.factor_turns import FactorTurns, steps_of
from lightning_accel.callbacks.sequential_freezing.training_length import length_of_training
from lightning_accel.lightning_private import every_callback
from lightning_accel.lightning_private.decision_line import say_decision
from lightning_accel.low_rank import AdaptiveFreezing, FreezingSchedule, low_rank_layers
from lightning_accel.low_rank.freezing import check_weights

_NAMES_SAID = 4  # of layers, in a line


class SequentialFreezing(pl.Callback):
    """Freeze the factor groups of every low-rank layer in turn, to skip their weight gradients.

    Acts at the first batch of each phase; which group is frozen is a pure function of epoch or step
    (`lightning_accel.low_rank.FreezingSchedule`), so there is no state and a resumed run agrees. Frozen factors have
    no gradient, so optimizers skip them, momentum and decay included; they stay in their groups. DDP is wrapped anew
    at each phase. What the user has frozen stays frozen. At the end everything is as trainable as it was.

    Works on layers that `RankQuantization` made (which may stand anywhere in the list) or the user decomposed. Logs
    ``sequential_freezing/group`` (-1 for none), ``sequential_freezing/frozen_parameters`` and
    ``sequential_freezing/step_seconds``, the mean of the epoch.

    Args:
        mode: ``"sequential"``, ``"fixed"``, ``"adaptive"`` (factors that hardly move, and modules before the first that
            does, rest for good) or ``"none"``.
        period_epochs: Mean length of a phase in epochs, >= 1. Give this or ``period_steps``; 1 epoch if neither.
        period_steps: Mean length of a phase in optimizer steps, >= 1.
        weights: Relative lengths of the phases in which group 0 and group 1 are frozen, > 0.
        start: First epoch (or step) in which anything is frozen, >= 0.
        end: First epoch (or step) from which nothing is frozen any more; None for never.
        final_trainable: Epochs (or steps) at the end of training in which nothing is frozen, >= 0.
        fixed_group: Group that ``mode="fixed"`` freezes, 0 or 1.
        threshold: ``mode="adaptive"``: relative update norm over a window under which a factor is frozen, > 0.
        window_steps: ``mode="adaptive"``: optimizer steps of a window, >= 1.

    Raises:
        TypeError: If a value is of another kind, such as text for a number.
        ValueError: If a value is out of range.
        MisconfigurationException: When ``fit`` starts: no low-rank layer, a sharding strategy or optimizer, L-BFGS, or
            ``final_trainable`` where nobody knows beforehand how long training lasts.

    References:
        Hajimolahoseini, Ahmed, Liu, arXiv:2309.03824. *Deviations*: unequal phases, start and end, adaptive mode.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_accel import RankQuantization, SequentialFreezing
        >>> from lightning_accel.zoo import MLP, Digits
        >>> off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        >>> callbacks = [RankQuantization(ratio=2.0), SequentialFreezing()]
        >>> trainer = Trainer(max_epochs=1, limit_train_batches=4, accelerator="cpu", **dict.fromkeys(off, False),
        ...                   callbacks=callbacks)
        >>> trainer.fit(MLP(width=16, depth=2), Digits())
    """

    def __init__(
        self,
        *,
        mode: Literal["none", "fixed", "sequential", "adaptive"] = "sequential",
        period_epochs: int | None = None,
        period_steps: int | None = None,
        weights: tuple[float, float] = (1.0, 1.0),
        start: int = 0,
        end: int | None = None,
        final_trainable: int = 0,
        fixed_group: int = 0,
        threshold: float = 1e-3,
        window_steps: int = 100,
    ) -> None:
        check_weights(weights)
        self.schedule = FreezingSchedule(
            mode=mode,
            period_epochs=period_epochs,
            period_steps=period_steps,
            weights=(weights[0], weights[1]),
            start=start,
            end=end,
            final_trainable=final_trainable,
            fixed_group=fixed_group,
        )
        self.turns = FactorTurns(self.schedule, AdaptiveFreezing(threshold=threshold, window_steps=window_steps))
        self._aside = False
        self._steps = 0
        self._times: list[float] = []
        self._clock = 0.0
        self._order: RunningOrder | None = None  # looks at one batch of the adaptive mode
        self._makers: list[ChangesStructure] = []
        self._looked_at = -1  # epoch in which layers were looked for

    def phase_weights(self) -> tuple[float, float] | None:
        """Return the shares of the phases in which group 0 and group 1 rest; None where nobody knows beforehand."""
        if self.schedule.mode == "fixed":
            return (1.0, 0.0) if self.schedule.fixed_group == 0 else (0.0, 1.0)
        return self.schedule.weights if self.schedule.mode == "sequential" else None

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Put the callbacks in order and refuse what can not work."""
        if stage != "fit":
            return
        refuse_sharded(trainer.strategy, "SequentialFreezing")
        correct_order(trainer)
        self.turns.begin()
        self._aside, self._steps, self._order = False, 0, None
        self._times.clear()
        self._makers, self._looked_at = [], -1

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Look for low-rank layers, or for a callback that will make them."""
        self._makers = [callback for callback in every_callback(trainer) if isinstance(callback, ChangesStructure)]
        factored = low_rank_layers(pl_module)
        if not factored and not self._makers:
            raise MisconfigurationException(
                f"SequentialFreezing found no low-rank layer in {type(pl_module).__name__} (looked for LowRankLinear, "
                "LowRankConv and TuckerConv). Add RankQuantization() to the callbacks, or decompose the model with "
                "`lightning_accel.low_rank.decompose`."
            )
        refuse_sharded_states(trainer.optimizers, "SequentialFreezing")
        # layers that are not low rank yet stay dense under L-BFGS
        lbfgs = any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers)
        if lbfgs and factored:
            raise MisconfigurationException(
                "SequentialFreezing can not rest factors under L-BFGS, which moves parameters without gradient along "
                "its old directions. Use another optimizer, or mode='none'."
            )
        if self.schedule.final_trainable:
            self.turns.total = length_of_training(trainer, in_steps=self.schedule.counts_steps)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Change the frozen group where a phase begins."""
        if self._aside:
            return
        self._clock = time.perf_counter()
        if self._ready(trainer, pl_module):
            if self.turns.follow(trainer, pl_module):
                self._say(trainer, pl_module)
            if self._adapts and not self.turns.adaptive.order:
                self._order = RunningOrder(pl_module)

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        """Take the step's time; watch the factors in adaptive mode."""
        if self.turns.applied is None and self._order is None:
            return
        self._times.append(time.perf_counter() - self._clock)
        if self._order is not None:
            self.turns.adaptive.order, self._order = self._order.stop(), None
        if self._adapts and self.turns.applied is not None and steps_of(trainer, self.schedule) > self._steps:
            self._steps = steps_of(trainer, self.schedule)
            if low_rank_layers(pl_module):
                self.turns.adaptive.observe(pl_module)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Log the epoch's phase and mean step time."""
        if self.turns.applied is None:
            return
        values = self.turns.values(pl_module) | {"step_seconds": sum(self._times) / max(1, len(self._times))}
        self._times.clear()
        pl_module.log_dict(
            {f"sequential_freezing/{name}": value for name, value in values.items()}, sync_dist=True, batch_size=1
        )

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Make everything trainable that this callback froze."""
        self.turns.thaw(pl_module)
        if not self.turns.began and not self._aside:
            say_decision(trainer, "SequentialFreezing", "steps aside: training ended before any layer was low rank.")

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Leave the module as it was."""
        self._stop(pl_module)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Leave the module as it was where a fit ended otherwise, as those of a `Tuner` do."""
        self._stop(pl_module)

    def on_structure_change(self, *_: Any) -> None:
        """Begin the phase anew with the new layers."""
        self.turns.applied, self._looked_at = None, -1

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the adaptive mode's statistics; the other modes have no state."""
        if not self._adapts:
            return {}
        return {"adaptive": self.turns.adaptive.state_dict(), "steps": self._steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.turns.adaptive.load_state_dict(state_dict["adaptive"])
        self._steps = state_dict["steps"]

    @property
    def _adapts(self) -> bool:
        return self.schedule.mode == "adaptive"

    def _ready(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> bool:
        if self.turns.applied is not None:
            return True
        pending = any(maker.structure_state() == "pending" for maker in self._makers)
        if pending and trainer.current_epoch == self._looked_at:
            return False
        self._looked_at = trainer.current_epoch  # whoever changes layers says so, or is seen in the next epoch
        if low_rank_layers(pl_module):
            return True
        if not pending:
            self._aside = True
            say_decision(trainer, "SequentialFreezing", "steps aside: RankQuantization left the model dense.")
        return False

    def _say(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        layers = list(low_rank_layers(pl_module))
        listed = ", ".join(layers[:_NAMES_SAID]) + (", ..." if len(layers) > _NAMES_SAID else "")
        how = {
            "none": "rest never",
            "fixed": f"of group {self.schedule.fixed_group} rest",
            "sequential": "take turns at rest",
            "adaptive": "rest for good once they hardly move",
        }
        line = f"the factors of {len(layers)} low-rank layers ({listed}) {how[self.schedule.mode]}."
        say_decision(trainer, "SequentialFreezing", line, {"sequential_freezing/layers": float(len(layers))})

    def _stop(self, pl_module: "pl.LightningModule") -> None:
        if self._order is not None:
            self._order.stop()
            self._order = None
        self.turns.thaw(pl_module)
