"""The rank plan: what was measured, what was decided and why; exact as JSON."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Method = Literal["knapsack", "paper", "fixed", "snapped"]
UNMEASURED = ("fixed", "snapped")
Weighting = Literal["none", "activation"]

_FORMAT = 1


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer.

    Attributes:
        ranks: ``(rank,)`` (two factors) or ``(r1, r2)`` (Tucker-2, three factors).
        energy: Retained energy, in [0, 1].
        parameters: Of the factors, without bias.
        ms: Median milliseconds of one training step (forward, backward, update) of this layer over all its calls in a
            batch; None where nothing was measured.
    """

    ranks: tuple[int, ...]
    energy: float
    parameters: int
    ms: float | None = None


@dataclass(frozen=True)
class LayerPlan:
    """Decision for one layer.

    Attributes:
        name: Module name.
        kind: ``"Linear"``, ``"Conv1d"``, ``"Conv2d"`` or the class name of a layer that is left alone.
        shape: Of the dense weight.
        ranks: Chosen ranks; None keeps the layer as it is.
        decision: ``"low rank"``, ``"dense"`` (considered and kept) or ``"skipped"`` (can not be factored).
        reason: Why, in words.
        energy: Energy the decision retains, 1.0 for dense.
        dense_ms: As `Candidate.ms`, of the dense layer.
        low_rank_ms: Of the chosen ranks.
        calls: How often the layer ran in the batch that was looked at; None if none was.
        input_shape: Of the input it was timed with.
        candidates: Everything that was considered.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...] | None
    decision: Literal["low rank", "dense", "skipped"]
    reason: str
    energy: float = 1.0
    dense_ms: float | None = None
    low_rank_ms: float | None = None
    calls: int | None = None
    input_shape: tuple[int, ...] | None = None
    candidates: tuple[Candidate, ...] = ()

    @property
    def dense_parameters(self) -> int:
        """Entries of the dense weight, without bias."""
        return math.prod(self.shape)

    @property
    def parameters(self) -> int:
        """Entries of the weight or of the factors that were chosen, without bias."""
        return self.dense_parameters if self.ranks is None else factor_parameters(self.shape, self.ranks)


@dataclass(frozen=True)
class RankPlan:
    """Ranks for a model: made by `make_plan`, applied by `decompose`, kept as JSON.

    Attributes:
        layers: One entry a linear or convolutional layer, skipped ones included, in the model's order.
        method: Rule that chose: ``"knapsack"``, ``"paper"``, ``"fixed"`` or ``"snapped"``.
        target: Name of the target: ``"ratio"``, ``"energy"`` or ``"speedup"``.
        value: Its value.
        weighting: ``"activation"`` if the energies are weighted by the inputs' second moments.
        reached: Value of the target that the plan reaches, by its own measurements.
        device: Where it was measured, see `lightning_accel.measure.environment`.
        reason: Why a run decided for it, or against low rank, in words; empty where nobody decided.

    Example:
        >>> from torch import nn
        >>> from lightning_accel.low_rank import RankPlan, make_plan
        >>> plan = make_plan(nn.Sequential(nn.Linear(64, 64)), None, ratio=2.0, method="fixed")
        >>> RankPlan.from_json(plan.to_json()) == plan
        True
    """

    layers: tuple[LayerPlan, ...]
    method: Method
    target: str
    value: float
    weighting: Weighting = "none"
    reached: float | None = None
    device: dict[str, str | int] = field(default_factory=dict)
    reason: str = ""

    @property
    def considered(self) -> tuple[LayerPlan, ...]:
        """Layers that could be factored."""
        return tuple(layer for layer in self.layers if layer.decision != "skipped")

    @property
    def parameters_before(self) -> int:
        """Weight entries of the considered layers when dense, without biases."""
        return sum(layer.dense_parameters for layer in self.considered)

    @property
    def parameters_after(self) -> int:
        """Weight entries of the considered layers as planned, without biases."""
        return sum(layer.parameters for layer in self.considered)

    @property
    def energy(self) -> float:
        """Mean retained energy of the considered layers, each counting once."""
        kept = [layer.energy for layer in self.considered]
        return sum(kept) / len(kept) if kept else 1.0

    @property
    def predicted_speedup(self) -> float | None:
        """Dense over planned milliseconds of the considered layers; None where nothing was measured."""
        timed = [layer for layer in self.considered if layer.dense_ms is not None]
        after = sum(_chosen_ms(layer) for layer in timed)
        return sum(layer.dense_ms or 0.0 for layer in timed) / after if after > 0.0 else None

    def dense(self, names: set[str], reason: str) -> "RankPlan":
        """Return a copy in which the named layers stay dense, for ``reason``."""
        layers = tuple(
            dataclasses.replace(layer, ranks=None, decision="dense", reason=reason, energy=1.0, low_rank_ms=None)
            if layer.name in names and layer.ranks is not None
            else layer
            for layer in self.layers
        )
        changed = dataclasses.replace(self, layers=layers)
        return changed if self.reached is None else changed.with_reached()

    def with_reached(self) -> "RankPlan":
        """Return a copy whose ``reached`` is that of the layers' present decisions."""
        after = self.parameters_after
        values = {
            "ratio": self.parameters_before / after if after else 1.0,
            "energy": self.energy,
            "speedup": self.predicted_speedup,
        }
        return dataclasses.replace(self, reached=values[self.target])

    def to_json(self) -> str:
        """Return the plan as JSON; `from_json` gives an equal plan back, floats bit for bit."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "RankPlan":
        """Read what `to_json` wrote.

        Raises:
            ValueError: If the text is not such JSON.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != _FORMAT:
                raise ValueError("unknown format")
            layers = tuple(_layer(entry) for entry in data.pop("layers"))
            return cls(layers=layers, **data)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this is no rank plan of format {_FORMAT} ({error!r}); make a new one.") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON to ``path``."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "RankPlan":
        """Read the JSON from ``path``.

        Raises:
            ValueError: If the file holds no rank plan.
        """
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def factor_parameters(shape: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    """Return the entries of the factors that replace a weight of ``shape``."""
    out, fan_in, *kernel = shape
    positions = math.prod(kernel)
    if len(ranks) == 1:
        return ranks[0] * (out + fan_in * positions)
    return ranks[0] * fan_in + ranks[0] * ranks[1] * positions + ranks[1] * out


def _chosen_ms(layer: LayerPlan) -> float:
    chosen = layer.dense_ms if layer.ranks is None else layer.low_rank_ms
    return chosen if chosen is not None else 0.0


def _layer(entry: dict[str, Any]) -> LayerPlan:
    entry["candidates"] = tuple(
        Candidate(**{**candidate, "ranks": tuple(candidate["ranks"])}) for candidate in entry["candidates"]
    )
    for key in ("shape", "ranks", "input_shape"):
        entry[key] = None if entry[key] is None else tuple(entry[key])
    return LayerPlan(**entry)
