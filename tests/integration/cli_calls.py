"""Calling ``lightning-accel`` inside the test's process, as the installed command would be."""

import logging
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_accel.cli import main

SMALL = ["model=mlp", "model.width=16", "model.depth=1", "data=digits", "debug=limit", "monitoring=[checkpoint]"]


@contextmanager
def _logging_left_alone():
    loggers = [logging.getLogger(), logging.getLogger("lightning")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    try:
        yield
    finally:
        for logger, handlers, level in before:
            logger.handlers[:] = handlers
            logger.setLevel(level)


def call(*words: str) -> int:
    """Return the exit code."""
    with _logging_left_alone(), pytest.raises(SystemExit) as stop:
        main(list(words))
    return int(stop.value.code)


def folders(command: str) -> list[Path]:
    """Return the folders of a command's runs, oldest first."""
    return sorted(Path("outputs", command).glob("*/*"))
