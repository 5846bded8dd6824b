"""Checks of constructor arguments: a wrong kind or range ends in the constructor, by the argument's name.

Annotations bind no configuration file: ``ratio: "2"`` arrives as text. Every check is one call, says what was expected
and what came, and returns nothing; kinds are `TypeError`, ranges `ValueError`.
"""

import math
import os
from collections.abc import Iterable, Sequence
from numbers import Integral, Real


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    optional: bool = False,
    infinite: bool = False,
) -> None:
    """Check that ``value`` is a real number in a range; true and false are none.

    Args:
        name: Of the argument.
        value: Given for it.
        above: Lower bound that is out of range itself.
        at_least: Lower bound.
        below: Upper bound that is out of range itself.
        at_most: Upper bound.
        optional: Whether None is right, too.
        infinite: Whether infinity is in an open range; NaN never is.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range.
    """
    if value is None and optional:
        return
    span, or_none = _range(above, at_least, below, at_most), " or None" if optional else ""
    if isinstance(value, bool) or not isinstance(value, Real):
        kind = " ".join(filter(None, ("a number", span)))
        raise TypeError(_refusal(name, kind + or_none, value))
    number = float(value)
    if math.isnan(number) or (math.isinf(number) and not infinite):
        raise ValueError(_refusal(name, (f"{span} and finite" if span else "a finite number") + or_none, value))
    outside = (
        (above is not None and not number > above)
        or (at_least is not None and not number >= at_least)
        or (below is not None and not number < below)
        or (at_most is not None and not number <= at_most)
    )
    if outside:
        raise ValueError(_refusal(name, span + or_none, value))


def check_integer(
    name: str, value: object, *, at_least: int | None = None, at_most: int | None = None, optional: bool = False
) -> None:
    """Check that ``value`` is an integer in a range; true, false and 2.0 are none.

    Args:
        name: Of the argument.
        value: Given for it.
        at_least: Lower bound.
        at_most: Upper bound.
        optional: Whether None is right, too.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is out of range.
    """
    if value is None and optional:
        return
    span, or_none = _range(None, at_least, None, at_most), " or None" if optional else ""
    if isinstance(value, bool) or not isinstance(value, Integral):
        kind = " ".join(filter(None, ("an integer", span)))
        raise TypeError(_refusal(name, kind + or_none, value))
    number = int(value)
    if (at_least is not None and number < at_least) or (at_most is not None and number > at_most):
        raise ValueError(_refusal(name, span + or_none, value))


def check_switch(name: str, value: object) -> None:
    """Check that ``value`` is True or False.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(_refusal(name, "True or False", value))


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        ValueError: If it is not, whatever its kind.
    """
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(_refusal(name, f"one of {', '.join(choices)}", value, hint=False))


def check_patterns(name: str, value: object) -> None:
    """Check that ``value`` is a list of shell patterns; one pattern by itself would count as a list of letters.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(word, str) for word in value):
        raise TypeError(_refusal(name, "a list of patterns, such as ['encoder.*']", value, hint=False))


def check_path(name: str, value: object, *, optional: bool = False) -> None:
    """Check that ``value`` is text or a path, or None where that is right, too.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, str | os.PathLike) and not (optional and value is None):
        raise TypeError(_refusal(name, f"a path{' or None' if optional else ''}", value))


def _range(above: float | None, at_least: float | None, below: float | None, at_most: float | None) -> str:
    low = next((bound for bound in (above, at_least) if bound is not None), None)
    high = next((bound for bound in (below, at_most) if bound is not None), None)
    if low is not None and high is not None:
        return f"in {'(' if above is not None else '['}{low:g}, {high:g}{')' if below is not None else ']'}"
    if low is not None:
        return f"{'>' if above is not None else '>='} {low:g}"
    if high is not None:
        return f"{'<' if below is not None else '<='} {high:g}"
    return ""


def _refusal(name: str, expected: str, value: object, *, hint: bool = True) -> str:
    unquote = " Write it without quotation marks." if hint and _is_quoted(value) else ""
    return f"`{name}` must be {expected}, got {value!r}.{unquote}"


def _is_quoted(value: object) -> bool:
    """Say whether text would have been right as a bare word of a configuration file."""
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return value.lower() in ("true", "false", "none", "null")
    return True
