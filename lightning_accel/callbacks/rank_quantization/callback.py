"""Rank quantization as a Lightning callback."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_accel.arguments import check_path, check_patterns, check_switch
from lightning_accel.callbacks.layer_exchange.exchanged_layers import ExchangedLayers
from lightning_accel.callbacks.layer_exchange.holders import why_not_exchanged
from lightning_accel.callbacks.layer_exchange.layers_of_others import TakesLayers
from lightning_accel.callbacks.layer_exchange.structure import (
    SharesLayers,
    can_switch_in_fit,
    exchange_layers_in_fit,
    follows_others,
    load_factors,
    refuse_sharded,
    refuse_sharded_states,
    refuse_unprepared,
    structure_hook,
)
from lightning_accel.callbacks.order import correct_order
from lightning_accel.callbacks.rank_quantization import reasons
from lightning_accel.callbacks.rank_quantization.decision import Decision
from lightning_accel.callbacks.rank_quantization.moment import When
from lightning_accel.callbacks.rank_quantization.request import RankRequest
from lightning_accel.callbacks.rank_quantization.switch import (
    check_something_to_factor,
    explain_failure,
    factor_as_planned,
    follow_back_in_finetuning,
    follow_in_finetuning,
    keep_held_dense,
    still_dense,
)
from lightning_accel.callbacks.rank_quantization.update_matching import UpdateMatching
from lightning_accel.callbacks.rank_quantization.verdict import Verdict, ranks_of
from lightning_accel.lightning_private import averaged_modules
from lightning_accel.lightning_private.decision_line import say_decision
from lightning_accel.low_rank import RankPlan, low_rank_layers
from lightning_accel.low_rank.plan import Method, Weighting
from lightning_accel.low_rank.rank_search.timing import default_cache_dir

_NAMES_SAID = 4  # of layers, in a line


class RankQuantization(TakesLayers, pl.Callback):
    """Replace layers by low-rank ones of measured ranks while ``fit`` runs, where that makes this run faster.

    Chooses *matrix ranks* that the hardware likes; it has nothing to do with numeric precision. Acts on the first
    batch of the run (or of epoch ``when``), where module, optimizers and a real batch are at hand: layers are measured,
    whole training steps are tried on a copy, and the factors take the dense weights' places in the optimizer's groups,
    moments included. Weights are kept, up to the energy that the ranks retain. DDP is wrapped anew, weight averages
    follow. What was decided, and the numbers, go to the log of ``lightning_accel`` and to `plan`.

    A checkpoint's keys and shapes tell its layers: resumed runs and ``test(ckpt_path=...)`` measure nothing. Without
    the callback see `lightning_accel.load_from_checkpoint` and `lightning_accel.enable_low_rank_loading`. Steps of
    manual optimization are tried for errors only; there, times of single layers decide, one batch later.

    Args:
        ratio: Target, see `lightning_accel.low_rank.make_plan`: dense weight entries over factor entries, > 1. Without
            any target 2.0.
        energy: Target: mean retained energy, in (0, 1].
        speedup: Target: dense over low-rank time of the layers, > 1.
        method: How ranks are chosen, see `make_plan`.
        when: ``"setup"``: at the first batch, for models with trained weights. An integer: at the start of that epoch
            (zero-based), for training from scratch. ``"auto"``: at the first batch if the weights look trained, else
            after a tenth of the epochs, at least one.
        plan: Apply this `RankPlan` (or the JSON file of one) and measure nothing.
        on_loss: ``"revert"``: stay dense where low rank does not pay in the steps that remain. ``"keep"``: only say so.
        max_overhead: Share of the remaining time that measuring may take before a gain is proven, >= 0. Where measuring
            ranks would not be paid back but whole steps with the theoretical ranks of ``ratio`` are faster, those are
            taken.
        min_energy: Least energy each layer retains, in [0, 1].
        weighting: ``"activation"`` weighs energies by the layers' inputs.
        match_updates: Let steps of Adam, AdamW, NAdam and Adamax move each product as far as they would move the dense
            weight, by a learning rate of the factors' own. Worth trying at ratios of 3 and more.
        include: Shell patterns of module names to consider.
        exclude: Shell patterns of module names to leave alone.
        cache_dir: Folder for measured times; None is `lightning_accel.low_rank.default_cache_dir`.

    Attributes:
        plan: What was decided (None before), to be saved and passed to a later run.

    Raises:
        TypeError: If a value is of another kind, such as text for a number.
        ValueError: If a value is out of range or more than one target is given.
        MisconfigurationException: When ``fit`` starts: no layer that can be factored, a sharding strategy or optimizer,
            or a strategy that can not switch layers and gets no plan.

    References:
        Hajimolahoseini, Ahmed, Liu, arXiv:2309.03824. *Deviations*: ranks of all layers are chosen together for the
        most retained energy, and dense stays a candidate throughout.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_accel import RankQuantization
        >>> from lightning_accel.zoo import MLP, Digits
        >>> off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        >>> trainer = Trainer(max_epochs=1, limit_train_batches=4, accelerator="cpu", **dict.fromkeys(off, False),
        ...                   callbacks=[RankQuantization(ratio=2.0)])
        >>> trainer.fit(MLP(width=16, depth=2), Digits())
    """

    def __init__(
        self,
        ratio: float | None = None,
        energy: float | None = None,
        speedup: float | None = None,
        *,
        method: Method = "knapsack",
        when: When = "auto",
        plan: RankPlan | str | Path | None = None,
        on_loss: Literal["revert", "keep"] = "revert",
        max_overhead: float = 0.03,
        min_energy: float = 0.5,
        weighting: Weighting = "none",
        match_updates: bool = False,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        cache_dir: str | Path | None = None,
    ) -> None:
        check_patterns("include", include)
        check_patterns("exclude", exclude)
        check_switch("match_updates", match_updates)
        check_path("cache_dir", cache_dir, optional=True)
        if not isinstance(plan, RankPlan):
            check_path("plan", plan, optional=True)
        request = RankRequest(
            ratio=2.0 if ratio is energy is speedup is None else ratio,
            energy=energy,
            speedup=speedup,
            method=method,
            min_energy=min_energy,
            weighting=weighting,
            include=tuple(include),
            exclude=tuple(exclude),
            cache_dir=default_cache_dir() if cache_dir is None else Path(cache_dir),
        )
        request.check()
        given = plan if plan is None or isinstance(plan, RankPlan) else RankPlan.load(plan)
        self.decision = Decision(request, given, when, on_loss, max_overhead)
        self.plan: RankPlan | None = None
        self._outcome: Literal["low rank", "dense"] | None = None
        self._said = False  # the line of this fit
        self._untried: Sequence[str] = ()  # made low rank in the step under way
        self._exchanged = ExchangedLayers()
        self._updates = UpdateMatching(match_updates)
        self._shares = False  # layers with other processes, of which one decides

    def structure_state(self) -> str:
        """Return ``"pending"``, ``"low rank"`` or ``"dense"``."""
        return self._outcome or "pending"

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Let the module follow checkpoints' layers; refuse strategies that can not."""
        if stage != "fit":
            structure_hook(pl_module)
            return
        refuse_sharded(trainer.strategy, "RankQuantization")
        refuse_unprepared(trainer, pl_module, "RankQuantization")
        hook = structure_hook(pl_module)
        correct_order(trainer)
        for average in averaged_modules(trainer):  # copied before this hook was there
            structure_hook(average)
        self._said = False
        self._exchanged.end()
        if not can_switch_in_fit(trainer.strategy):
            self.plan = self.decision.unmeasured_plan(trainer, pl_module)
            with isolate_rng():
                names = factor_as_planned(self.plan, None, self.decision.shared, pl_module)
            self.decision.forget()
            self._updates.choose(trainer, pl_module)
            self._settle(trainer, pl_module, Verdict(self.plan, reasons.unmeasured(trainer.strategy)), names)
            return
        hook.defer()
        self.decision.begin()
        if self._outcome != "low rank" or not low_rank_layers(pl_module):  # else a second fit of what was replaced
            self._outcome, self._updates.multipliers = None, {}

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Put a checkpoint's factors in their places, before the optimizers' states are restored."""
        refuse_sharded_states(trainer.optimizers, "RankQuantization")
        held = structure_hook(pl_module).release()
        if held:
            with isolate_rng():
                exchange_layers_in_fit(trainer, pl_module, functools.partial(load_factors, held))
            self._outcome = "low rank"
            follow_in_finetuning(trainer, pl_module, low_rank_layers(pl_module))
        self._exchanged.resume(trainer, pl_module)
        self._updates.begin(trainer, pl_module)
        if self._outcome is None:
            check_something_to_factor(pl_module, self.decision.request.include, self.decision.request.exclude)
        self._shares = isinstance(trainer.strategy, SharesLayers)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Say what an earlier fit has decided."""
        if self._outcome is not None and not self._said:
            self._say(trainer, low_rank_layers(pl_module), reasons.DECIDED_BEFORE, {})

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Decide and switch, once, when the time has come; from then on follow layers that become dense."""
        if self._outcome is not None or (self._shares and not trainer.is_global_zero):
            if self._exchanged.factors:
                self._turn_dense(trainer, pl_module, self._exchanged.at_batch_start(trainer, pl_module))
            return
        verdict = self.decision.at_batch_start(trainer, pl_module, batch, batch_idx)
        if verdict is not None:
            self._switch(trainer, pl_module, verdict)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Let weights that were written into in this step be updated in it."""
        if self._exchanged.factors:
            self._turn_dense(trainer, pl_module, self._exchanged.before_update(trainer, pl_module))

    def on_structure_change(self, trainer: "pl.Trainer", *_: Any) -> None:
        """Know that another process has decided, where one decides for all."""
        if follows_others(trainer):
            self._outcome = "low rank"

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        """Decide by the step that was watched; look at the first steps after the switch."""
        self._untried = ()
        if self._outcome is not None:
            if self._exchanged.first is not None:
                self._turn_dense(trainer, pl_module, self._exchanged.at_batch_end(trainer, pl_module))
            return
        verdict = self.decision.at_batch_end(trainer, pl_module)
        if verdict is not None:
            self._switch(trainer, pl_module, verdict)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Say so where the switch never came; a fit that goes on may still decide."""
        self._exchanged.end()
        if self._outcome is None and not follows_others(trainer):
            verdict = self.decision.unreached()
            self.plan = verdict.explained()
            self._say(trainer, (), verdict.reason, verdict.metrics())

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Leave no hook behind; say what to do if the new layers may be the reason."""
        if self._untried and isinstance(exception, Exception):
            explain_failure(pl_module, self._untried, exception)
        self._untried = ()
        RankQuantization.teardown(self, trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Leave no hook behind where a fit ended before it began, as those of a `Tuner` do."""
        self.decision.stop()
        self._exchanged.end()
        self._updates.end()
        structure_hook(pl_module).release()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return decision and plan; the layers themselves are told by the weights."""
        plan = None if self.plan is None else self.plan.to_json()
        state = {"outcome": self._outcome, "switch_epoch": self.decision.switch_epoch, "plan": plan}
        return state | {"update_multipliers": dict(self._updates.multipliers)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`: a resumed run decides nothing anew."""
        self._outcome, self.decision.switch_epoch = state_dict["outcome"], state_dict["switch_epoch"]
        self._updates.multipliers = dict(state_dict.get("update_multipliers", {}))  # not there before there were any
        self.plan = None if state_dict["plan"] is None else RankPlan.from_json(state_dict["plan"])

    def _switch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", verdict: Verdict) -> None:
        if isinstance(verdict.reason, reasons.NotExchanged):
            self._leave_dense(trainer, pl_module, verdict)
            return
        self.plan = keep_held_dense(verdict.explained(), trainer, pl_module)
        planned = still_dense(self.plan, pl_module)
        if not planned:
            self.decision.forget()
            self._settle(trainer, pl_module, verdict, list(ranks_of(self.plan)))
            return
        if why := why_not_exchanged(trainer, pl_module, planned):
            refused = reasons.NotExchanged(why)
            plan = dataclasses.replace(self.plan.dense(set(planned), why), reason=str(refused))
            self._leave_dense(trainer, pl_module, Verdict(plan, refused))
            return
        change = functools.partial(factor_as_planned, self.plan, self.decision.inputs, self.decision.shared)
        with isolate_rng():
            exchange = exchange_layers_in_fit(trainer, pl_module, change)
        names = exchange.names
        self._exchanged.begin(trainer, pl_module, exchange)
        self._updates.choose(trainer, pl_module)
        follow_in_finetuning(trainer, pl_module, names)
        self.decision.forget()
        self._untried = names
        self._settle(trainer, pl_module, verdict, names)

    def _leave_dense(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", verdict: Verdict) -> None:
        self.plan = verdict.explained()
        self.decision.forget()
        self._settle(trainer, pl_module, verdict, ())
        rank_zero_warn(f"RankQuantization leaves {type(pl_module).__name__} dense: {verdict.reason}.")

    def _turn_dense(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", reasons_of: Mapping[str, str]
    ) -> None:
        """Say which layers are dense again, and why, once."""
        if not reasons_of:
            return
        for name, why in reasons_of.items():
            self.plan = None if self.plan is None else self.plan.dense({name}, why)
        self._outcome = "low rank" if low_rank_layers(pl_module) else "dense"
        self._updates.forget(reasons_of)
        follow_back_in_finetuning(trainer, reasons_of)
        names = ", ".join(list(reasons_of)[:_NAMES_SAID]) + (", ..." if len(reasons_of) > _NAMES_SAID else "")
        rank_zero_warn(f"RankQuantization put {names} back, dense from now on: {next(iter(reasons_of.values()))}.")

    def _settle(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", verdict: Verdict, names: Sequence[str]
    ) -> None:
        self._outcome = "low rank" if low_rank_layers(pl_module) else "dense"
        metrics = dataclasses.replace(verdict, plan=self.plan or verdict.plan).metrics()
        self._say(trainer, names, verdict.reason, metrics)

    def _say(
        self, trainer: "pl.Trainer", names: Collection[str], reason: reasons.Reason, metrics: Mapping[str, float]
    ) -> None:
        self._said = True
        listed = ", ".join(list(names)[:_NAMES_SAID]) + (", ..." if len(names) > _NAMES_SAID else "")
        head = f"{len(names)} layers are low rank now ({listed})" if names else "the model stays dense"
        say_decision(trainer, "RankQuantization", f"{head}: {reason}.", metrics)
