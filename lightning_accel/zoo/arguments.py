"""Checks of constructor arguments, so that a wrong configuration ends before the first step."""

import math
from collections.abc import Iterable


def check_integers(minimum: int = 1, **values: int) -> None:
    """Check that every value is an integer of at least ``minimum``.

    Raises:
        ValueError: Naming the first value that is not.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"`{name}` must be an integer >= {minimum}, got {value!r}.")


def check_numbers(minimum: float, maximum: float = math.inf, *, above: bool = False, **values: float) -> None:
    """Check that every value is a finite number in ``[minimum, maximum)``, or in ``(minimum, maximum)`` if ``above``.

    Raises:
        ValueError: Naming the first value that is not.
    """
    for name, value in values.items():
        number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
        if not number or value < minimum or (above and value == minimum) or value >= maximum:
            rule = f"{'>' if above else '>='} {minimum}" + ("" if math.isinf(maximum) else f" and < {maximum}")
            raise ValueError(f"`{name}` must be a finite number {rule}, got {value!r}.")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        ValueError: Listing the choices, if it is not.
    """
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
