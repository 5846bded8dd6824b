"""What kinds of values the projection callbacks take; ranges are checked where the values are used."""

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path

from lightning_accel.arguments import check_integer, check_number, check_switch


def check_kinds(
    *,
    numbers: Mapping[str, object],
    counts: Mapping[str, object],
    optional_counts: Mapping[str, object],
    switches: Mapping[str, object],
    optional_switches: Mapping[str, object],
) -> None:
    """Refuse arguments of another kind, such as text from a configuration.

    Args:
        numbers: Name to what must be a real number or ``None``.
        counts: Name to what must be an integer.
        optional_counts: Name to what must be an integer or ``None``.
        switches: Name to what must be true or false.
        optional_switches: Name to what must be true, false or ``None``.

    Raises:
        TypeError: If one is not.
        ValueError: If a number is NaN.
    """
    for name, value in numbers.items():
        check_number(name, value, optional=True, infinite=True)
    for name, value in optional_counts.items():
        check_integer(name, value, optional=True)
    for name, value in counts.items():
        check_integer(name, value)
    for name, value in switches.items():
        check_switch(name, value)
    for name, value in optional_switches.items():
        if value is not None:
            check_switch(name, value)


def words(name: str, given: str | Sequence[str], what: str) -> tuple[str, ...]:
    """Return one word or several as a tuple.

    Args:
        name: Of the argument.
        given: Its value.
        what: A word stands for, to be said where there is none.

    Raises:
        TypeError: If something is no text.
        ValueError: If there is no word, or an empty one.
    """
    found = (given,) if isinstance(given, str) else given
    if not isinstance(found, Sequence) or not all(isinstance(word, str) for word in found):
        raise TypeError(f"`{name}` must be text or several texts, got {given!r}. Each is {what}.")
    if not found or not all(found):
        raise ValueError(f"`{name}` must hold at least one word and no empty one, got {given!r}. Each is {what}.")
    return tuple(found)


def dimensions(name: str, given: object) -> tuple[int, ...]:
    """Return dimensions as a tuple.

    Raises:
        TypeError: If they are no integers.
        ValueError: If one is named twice.
    """
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(map(_is_integer, given)):
        raise TypeError(f"`{name}` must name dimensions as integers, such as (0,), got {given!r}.")
    if len(set(given)) < len(given):
        raise ValueError(f"`{name}` must name each dimension once, got {tuple(given)}.")
    return tuple(int(d) for d in given)


def levels(given: object) -> tuple[tuple[int, ...], ...]:
    """Return the dimensions of each level as tuples.

    Raises:
        TypeError: If they are no lists of integers.
        ValueError: If a level names a dimension twice.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"`dims` must list the dimensions of each level, such as [(0,), (1,)], got {given!r}.")
    return tuple(dimensions("dims", level) for level in given)


def rewind_source(given: str | os.PathLike[str]) -> str:
    """Return what to rewind to as text.

    Raises:
        TypeError: If it is neither text nor a path.
    """
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"`rewind` must be 'none', 'init' or the path of a checkpoint, got {given!r}.")
    return os.fspath(given)


def check_rewind(source: str) -> None:
    """Refuse to rewind to a file that is not there.

    Raises:
        ValueError: If so.
    """
    if source not in ("none", "init") and "://" not in source and not Path(source).exists():
        raise ValueError(
            f"`rewind` must be 'none', 'init' or the path of a checkpoint, got {source!r}, where there is no file."
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
