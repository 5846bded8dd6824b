"""What constructors say of values of the wrong kind and out of range."""

import math
from pathlib import Path

import pytest

from lightning_accel.arguments import (
    check_choice,
    check_integer,
    check_number,
    check_path,
    check_patterns,
    check_switch,
)


@pytest.mark.parametrize(
    ("value", "settings"),
    [(2, {"above": 1}), (1.0, {"at_least": 1.0, "at_most": 1.0}), (None, {"optional": True}), (-3.5, {})],
)
def test_right_numbers_pass(value, settings):
    check_number("ratio", value, **settings)
    check_number("radius", math.inf, at_least=0.0, infinite=True)


@pytest.mark.parametrize(
    ("value", "settings", "error", "message"),
    [
        ("abc", {"above": 1}, TypeError, r"`ratio` must be a number > 1, got 'abc'\.$"),
        ("3", {"above": 1}, TypeError, r"`ratio` must be a number > 1, got '3'\. Write it without quotation marks\.$"),
        ("null", {"optional": True}, TypeError, r"must be a number or None, got 'null'\. Write it without quotation"),
        (True, {}, TypeError, "must be a number, got True"),
        (None, {}, TypeError, "must be a number, got None"),
        ([1.0], {"at_least": 0, "at_most": 1}, TypeError, r"must be a number in \[0, 1\], got \[1.0\]"),
        (1j, {}, TypeError, "must be a number, got 1j"),
        (0, {"above": 1, "optional": True}, ValueError, "must be > 1 or None, got 0"),
        (math.nan, {}, ValueError, "must be a finite number, got nan"),
        (math.nan, {"infinite": True}, ValueError, "must be a finite number, got nan"),
        (math.inf, {"above": 1}, ValueError, "must be > 1 and finite, got inf"),
        (1.0, {"above": 1}, ValueError, "must be > 1, got 1.0"),
        (-1, {"at_least": 0}, ValueError, "must be >= 0, got -1"),
        (1.0, {"at_least": 0, "below": 1}, ValueError, r"must be in \[0, 1\), got 1.0"),
        (0.0, {"above": 0, "at_most": 1}, ValueError, r"must be in \(0, 1\], got 0.0"),
        (3.0, {"at_most": 2}, ValueError, "must be <= 2, got 3.0"),
        (2.0, {"below": 2}, ValueError, "must be < 2, got 2.0"),
    ],
)
def test_wrong_numbers_are_refused_by_name(value, settings, error, message):
    with pytest.raises(error, match=message):
        check_number("ratio", value, **settings)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (2.0, TypeError, "`steps` must be an integer >= 1, got 2.0"),
        (math.nan, TypeError, "`steps` must be an integer >= 1, got nan"),
        ("3", TypeError, "got '3'. Write it without quotation marks"),
        (True, TypeError, "must be an integer >= 1, got True"),
        (0, ValueError, "`steps` must be >= 1, got 0"),
    ],
)
def test_wrong_integers_are_refused_by_name(value, error, message):
    check_integer("steps", 1, at_least=1)
    check_integer("steps", None, optional=True)
    with pytest.raises(error, match=message):
        check_integer("steps", value, at_least=1)
    with pytest.raises(ValueError, match=r"`steps` must be in \[0, 1\], got 2"):
        check_integer("steps", 2, at_least=0, at_most=1)


def test_switches_choices_and_patterns():
    check_switch("live", False)
    with pytest.raises(TypeError, match=r"`live` must be True or False, got 'true'. Write it without quotation marks"):
        check_switch("live", "true")
    check_choice("mode", "fixed", ("none", "fixed"))
    for wrong in ("often", 3, None, ["fixed"]):
        with pytest.raises(ValueError, match="`mode` must be one of none, fixed, got"):
            check_choice("mode", wrong, ("none", "fixed"))
    check_patterns("include", ["*", "net.*"])
    for wrong in ("*", 3, [1]):
        with pytest.raises(TypeError, match=r"`include` must be a list of patterns, such as \['encoder.\*'\], got"):
            check_patterns("include", wrong)


def test_paths():
    check_path("cache_dir", "here")
    check_path("cache_dir", Path("here"))
    check_path("cache_dir", None, optional=True)
    for wrong in (3, None, ["here"]):
        with pytest.raises(TypeError, match="`cache_dir` must be a path, got"):
            check_path("cache_dir", wrong)
