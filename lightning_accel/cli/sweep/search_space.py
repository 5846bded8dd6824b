"""What an Optuna search may vary, read from Hydra's overrides."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Transformer
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_accel.cli.errors import UsageError

_SIMPLE = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class SearchSpace:
    """Overrides of a search.

    Attributes:
        varied: Key to the distribution of its values, from ``a,b``, ``choice(a,b)``, ``range(...)``,
            ``interval(...)``, ``tag(log,interval(...))``.
        fixed: Overrides that all trials share, as given.
    """

    varied: dict[str, BaseDistribution]
    fixed: tuple[str, ...]


def read_search_space(words: Sequence[str]) -> SearchSpace:
    """Part overrides into those that a search varies and those that stay.

    Raises:
        UsageError: If a word can be no distribution of Optuna.
    """
    varied: dict[str, BaseDistribution] = {}
    fixed: dict[str, str] = {}
    for override in OverridesParser.create().parse_overrides(list(words)):
        key = override.input_line if override.is_delete() else override.get_key_element()
        assert key is not None
        assert override.input_line is not None
        if override.is_sweep_override():
            varied[key] = _distribution(override)
            fixed.pop(key, None)
        else:  # a later word replaces an earlier one, on the command line as in `params`
            fixed[key] = override.input_line
            varied.pop(key, None)
    return SearchSpace(varied, tuple(fixed.values()))


def grid_of(space: SearchSpace) -> dict[str, list[object]]:
    """Return all values of each key, for an exhaustive search.

    Raises:
        UsageError: If a key has infinitely many.
    """
    grid: dict[str, list[object]] = {}
    for key, distribution in space.varied.items():
        if isinstance(distribution, CategoricalDistribution):
            grid[key] = list(distribution.choices)
        elif isinstance(distribution, IntDistribution) and not distribution.log:
            grid[key] = list(range(distribution.low, distribution.high + 1, distribution.step))
        else:
            raise UsageError(f"a grid needs listed values, or a range, for `{key}`: write {key}=a,b,c.")
    return grid


def _distribution(override: Override) -> BaseDistribution:
    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        if low is None or high is None or low > high or (log and low <= 0):
            raise UsageError(
                f"`{override.input_line}` must go from a low to a high end{', above 0' if log else ''}; "
                "write key=interval(1,4) or key=tag(log,interval(1e-4,1e-2))."
            )
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(float(low), float(high), log=log)
    if isinstance(value, RangeSweep) and not value.shuffle:
        start, stop, step = value.start, value.stop, value.step
        if isinstance(start, int) and isinstance(stop, int) and isinstance(step, int) and step > 0 and start < stop:
            numbers = range(start, stop, step)
            return IntDistribution(numbers[0], numbers[-1], step=step)
    if isinstance(value, ChoiceSweep | RangeSweep):
        choices = list(override.sweep_iterator(transformer=Transformer.encode))
        if choices and all(isinstance(choice, _SIMPLE) for choice in choices):
            return CategoricalDistribution(choices)
    raise UsageError(f"`{override.input_line}` must list values, or be a range or an interval, to be searched.")
