"""How numbers are written in tables: few digits, units a reader knows, "never" for what did not happen."""

import math

from lightning_accel.evidence.comparison import Line, Unit
from lightning_accel.measure import PairedDifference, PairedRatio

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_JOULES = ((3.6e6, "kWh"), (1e3, "kJ"), (1.0, "J"))
_COUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def write_value(value: float, unit: Unit) -> str:
    """Write a value with three digits and its unit."""
    if math.isinf(value):
        return "never"
    if value == 0.0 and unit == "seconds":
        return "0 s"
    if unit == "count" and abs(value) < 1000.0:
        return f"{value:g}"
    if unit == "metric":
        return f"{value:.4f}"
    if unit == "seconds" and value >= 100.0:
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
    scales = {"seconds": _SECONDS, "bytes": _BYTES, "joules": _JOULES}.get(unit, _COUNTS)
    scale, name = next(((s, n) for s, n in scales if abs(value) >= s), scales[-1] if unit == "seconds" else (1.0, ""))
    space = " " if name and unit in ("seconds", "bytes", "joules") else ""
    text = f"{_digits(value / scale)}{space}{name}"
    return f"{text} /s" if unit == "per second" else text


def write_ratio(ratio: PairedRatio) -> str:
    """Write a ratio with its interval, ``1.42 [1.38, 1.47]``."""
    return f"{_factor(ratio.median)} [{_factor(ratio.low)}, {_factor(ratio.high)}]"


def write_difference(difference: PairedDifference) -> str:
    """Write a difference with its interval and signs."""
    return f"{difference.median:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def write_effect(line: Line) -> str:
    """Write what a line found: a ratio, a difference, or nothing."""
    if line.ratio is not None:
        same = line.ratio.low == line.ratio.median == line.ratio.high
        return _factor(line.ratio.median) if same else write_ratio(line.ratio)
    return write_difference(line.difference) if line.difference is not None else ""


def _digits(value: float) -> str:
    if value == 0.0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100.0 else f"{value:.1f}" if abs(value) >= 10.0 else f"{value:.2f}"


def _factor(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if value < 100.0 else f"{value:.0f}"
