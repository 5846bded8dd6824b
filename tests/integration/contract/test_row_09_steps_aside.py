"""Row 9: where it does not pay, an accelerator leaves the run alone and says so."""

import logging
import re

import pytest
from accelerators import ACCELERATORS
from contract_runs import assert_equal_modules, assert_equal_optimizers, fit

WITH_A_PROBE = [entry for entry in ACCELERATORS if entry.steps_aside is not None]


@pytest.mark.parametrize("entry", WITH_A_PROBE, ids=lambda entry: entry.name)
def test_run_that_can_not_pay_equals_plain_training(entry, tmp_path, caplog):
    plain, plain_trainer = fit(entry, tmp_path / "plain", callbacks=[], strategy="auto")
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        aside, aside_trainer = fit(entry, tmp_path / "aside", callbacks=entry.steps_aside())
    assert re.search(entry.aside_log, caplog.text), caplog.text
    assert re.search(r"\d", caplog.text), "the reason comes with its numbers"
    assert_equal_modules(plain, aside)
    assert_equal_optimizers(plain_trainer, aside_trainer)
