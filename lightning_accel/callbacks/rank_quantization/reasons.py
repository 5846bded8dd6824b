"""Why a model became low rank or stayed dense: values with the numbers, rendered where somebody reads them."""

from dataclasses import dataclass
from typing import Protocol

from lightning_accel.measure import PairedRatio


class Reason(Protocol):
    """Why something was decided. Code asks for its type and its numbers, readers for its text."""

    def __str__(self) -> str:
        """Return one sentence without a full stop."""


@dataclass(frozen=True)
class Comparison:
    """Whole training steps were timed.

    Attributes:
        dense: Median seconds of a dense step.
        low_rank: Median seconds of a step with low-rank layers.
        ratio: Dense over low rank, pair by pair.
    """

    dense: float
    low_rank: float
    ratio: PairedRatio

    @property
    def saved(self) -> float:
        """Seconds a step, by the medians."""
        return self.dense - self.low_rank

    @property
    def faster(self) -> bool:
        """Whether low rank is faster beyond the noise."""
        return self.ratio.verdict == "faster"

    def __str__(self) -> str:
        interval = f"x{self.ratio.median:.2f} [{self.ratio.low:.2f}, {self.ratio.high:.2f}]"
        return f"a whole step takes {1e3 * self.low_rank:.2f} ms instead of {1e3 * self.dense:.2f} ms, {interval}"


@dataclass(frozen=True)
class TooShort:
    """Finding out costs more than its share of what remains."""

    remaining: float
    needed: int
    share: float

    def __str__(self) -> str:
        return (
            f"{self.remaining:.0f} steps remain, and finding out whether low rank pays takes {self.needed} or more: "
            f"over {self.share:.0%} of them. Train longer, pass `plan=`, or set on_loss='keep'"
        )


@dataclass(frozen=True)
class LengthUnknown:
    """Training ended before it was known to be long enough."""

    batches: int
    needed: int
    share: float

    def __str__(self) -> str:
        return (
            "nothing told how long training would go on (data without a length, or no limit), so it was taken to go on "
            f"for as long again as it had: {self.batches} batches at the end, and finding out whether low rank pays "
            f"takes {self.needed}, over {self.share:.0%} of them. Set max_steps, pass `plan=`, or set on_loss='keep'"
        )


@dataclass(frozen=True)
class NeverReached:
    """Training ends before the epoch of the switch."""

    epoch: int | None

    def __str__(self) -> str:
        return f"training ended before epoch {self.epoch}, where layers would have been replaced; set `when`"


@dataclass(frozen=True)
class LayersGainTooLittle:
    """The layers by themselves gain less than a trial costs."""

    low_rank: float
    dense: float
    remaining: float

    def __str__(self) -> str:
        return (
            f"its layers alone take {1e3 * self.low_rank:.2f} ms with theoretical ranks and {1e3 * self.dense:.2f} ms "
            f"dense, too little gain for {self.remaining:.0f} steps to try whole ones"
        )


@dataclass(frozen=True)
class MeasuringTooLong:
    """Measuring ranks takes longer than it can give back."""

    planning: float
    remaining: float
    quick: Comparison | None = None

    def __str__(self) -> str:
        first = "" if self.quick is None else f"with unmeasured ranks {self.quick}; "
        return (
            f"{first}measuring ranks would take about {self.planning:.1f} s, "
            f"more than {self.remaining:.0f} remaining steps can be expected to give back"
        )


@dataclass(frozen=True)
class LostToTheFloor:
    """Layers stay dense because no rank keeps enough of them."""

    layers: int
    considered: int
    min_energy: float

    def __str__(self) -> str:
        return (
            f"{self.layers} of {self.considered} layers stay dense because they would retain less than "
            f"min_energy={self.min_energy:g} of their energy: lower it, take a smaller ratio, or warm up for longer"
        )


@dataclass(frozen=True)
class TheoreticalRanks:
    """Ranks by theory, for want of time to measure."""

    unpaid: Reason
    lost: LostToTheFloor | None
    tried: Reason | None

    def __str__(self) -> str:
        lost = "" if self.lost is None else f" ({self.lost})"
        tried = "no layer is left to be low rank" if self.tried is None else str(self.tried)
        return f"{self.unpaid}, so theoretical ranks are taken{lost}; {tried}"


@dataclass(frozen=True)
class DoesNotPay:
    """Whole steps are no faster."""

    tried: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"low rank does not pay: {self.tried}{self.detail and '; '}{self.detail}"


@dataclass(frozen=True)
class SetUp:
    """What deciding took and what the decision saves in the steps that remain."""

    because: Reason
    seconds: float
    remaining: float
    saved: float
    kept: bool

    def __str__(self) -> str:
        numbers = (
            f"{self.because}; set-up took {self.seconds:.2f} s, the {self.remaining:.0f} remaining steps save "
            f"{self.saved:.2f} s"
        )
        return numbers if self.kept else f"low rank does not pay back its set-up: {numbers}"


@dataclass(frozen=True)
class NoLayerGains:
    """Measured layer by layer, none is faster at a rank that keeps enough."""

    lost: LostToTheFloor | None = None

    def __str__(self) -> str:
        return "no layer gains by low rank" + ("" if self.lost is None else f" ({self.lost})")


@dataclass(frozen=True)
class JudgedByLayers:
    """Single layers were timed, because whole steps can not be tried."""

    saved: float
    because: Reason

    def __str__(self) -> str:
        return f"judged by single layers, {1e3 * self.saved:.2f} ms a step, because {self.because}"


@dataclass(frozen=True)
class NotExchanged:
    """Layers can not be exchanged in this fit without changing what is trained."""

    found: str

    def __str__(self) -> str:
        return self.found


@dataclass(frozen=True)
class NothingToFactor:
    """No layer could be low rank when the time came."""

    found: str

    def __str__(self) -> str:
        return f"no layer can be factored (any more); found: {self.found}"


@dataclass(frozen=True)
class Words:
    """A reason without numbers."""

    text: str

    def __str__(self) -> str:
        return self.text


MANUAL = Words("steps of manual optimization are not timed")
OWN_ITERATOR = Words("a `training_step` that draws its batches itself can not be tried")
NO_MEMORY = Words(
    "memory does not suffice for a second copy of module and optimizers. Make a plan beforehand "
    "(`lightning-accel plan`) and pass `plan=`, or try with a smaller batch"
)
ALL_UNFIT = Words("the training step fails, or has another loss, with any of its layers low rank")
NO_LAYER_GAINS_ALONE = Words("no layer gains by low rank, by its own time")
AS_PLANNED = Words("as the given plan says")
DECIDED_BEFORE = Words("so it was decided in an earlier fit, or before the checkpoint")


def not_copied(problem: BaseException) -> Words:
    """Return why a step could not be tried on a copy."""
    return Words(f"a copy of the module can not make its training step ({problem!r})")


def trial_failed(problem: BaseException) -> Words:
    """Return why a trial ended without a result."""
    return Words(f"a trial step on a copy failed ({problem!r})")


def unmeasured(strategy: object) -> Words:
    """Return why layers were switched before training, by a plan that nobody could try."""
    return Words(f"unmeasured, because {type(strategy).__name__} can not switch layers while it trains")
