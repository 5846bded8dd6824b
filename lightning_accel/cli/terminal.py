"""Where commands print: a terminal as wide as it is, or a pipe, in which no path and no name is broken."""

import sys

from rich.console import Console

_WIDE = 1000  # columns; tables take no more than they need


def open_console() -> Console:
    """Return the console of standard output."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
