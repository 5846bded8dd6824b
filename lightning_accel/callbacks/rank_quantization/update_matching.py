"""Learning rates of factors in a running fit: chosen at the switch, kept in checkpoints, in force during steps."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_accel.callbacks.layer_exchange.structure import SharesLayers
from lightning_accel.low_rank import MatchedUpdates, low_rank_layers, update_multiplier
from lightning_accel.low_rank.optimizers.matched_updates import why_not_matched


@dataclass
class UpdateMatching:
    """The multipliers of a run's low-rank layers, and what puts them in force; see `MatchedUpdates`.

    Args:
        wanted: Choose multipliers at the switch. Those of a checkpoint are kept either way.

    Attributes:
        multipliers: Layer name to multiplier; empty before the switch.
    """

    wanted: bool
    multipliers: dict[str, float] = field(default_factory=dict)
    _matched: list[MatchedUpdates] = field(default_factory=list, compare=False)

    def choose(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        """Choose the multipliers by the factors as they are now, on all processes alike, and `begin`.

        None are chosen where a server makes the steps: a later fit that goes on without it trains as this one did.
        """
        if self.wanted and isinstance(trainer.strategy, SharesLayers):
            _say_who_steps(trainer)
        elif self.wanted:
            chosen = {name: update_multiplier(layer) for name, layer in low_rank_layers(module).items()}
            self.multipliers = trainer.strategy.broadcast(chosen)
            self.begin(trainer, module)

    def begin(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        """Put the multipliers in force in this fit's optimizers; say where that can not be."""
        self.end()
        layers = low_rank_layers(module)
        multipliers = {layers[name]: value for name, value in self.multipliers.items() if name in layers}
        if not multipliers:
            return
        if isinstance(trainer.strategy, SharesLayers):
            _say_who_steps(trainer)
            return
        factors = {getattr(layer, name) for layer in multipliers for name in layer.factor_names}
        for optimizer in trainer.optimizers:
            if any(parameter in factors for group in optimizer.param_groups for parameter in group["params"]):
                if why := why_not_matched(optimizer):
                    _say(why)
                else:
                    self._matched.append(MatchedUpdates(optimizer, multipliers))

    def forget(self, names: Iterable[str]) -> None:
        """Forget layers that are dense again; their factors are in no group any more."""
        for name in names:
            self.multipliers.pop(name, None)

    def end(self) -> None:
        """Let the optimizers step as they do by themselves."""
        for matched in self._matched:
            matched.remove()
        self._matched = []


def _say_who_steps(trainer: "pl.Trainer") -> None:
    _say(f"{type(trainer.strategy).__name__} makes the steps elsewhere")


def _say(why: str) -> None:
    rank_zero_warn(f"RankQuantization(match_updates=True) leaves the optimizer's steps as they are: {why}.")
