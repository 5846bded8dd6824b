"""Row 2: the neutral setting equals plain training."""

import pytest
from accelerators import cases
from contract_runs import assert_equal_modules, assert_equal_optimizers, fit


@pytest.mark.parametrize("entry", cases())
def test_neutral_setting_equals_plain_training(entry, tmp_path):
    plain, plain_trainer = fit(entry, tmp_path / "plain", callbacks=[], strategy="auto")
    neutral, neutral_trainer = fit(
        entry, tmp_path / "neutral", callbacks=entry.neutral(), strategy=entry.neutral_strategy()
    )
    assert_equal_modules(plain, neutral, tolerance=entry.neutral_tolerance)
    assert_equal_optimizers(plain_trainer, neutral_trainer, tolerance=entry.neutral_tolerance)
