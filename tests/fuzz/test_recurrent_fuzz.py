"""Three hundred random modules with loops over cells: none trains otherwise, and many gain."""

import logging

import pytest
import recurrent_fuzz

PART = 30


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_random_modules_train_as_without_schedules(part, caplog):
    with caplog.at_level(logging.ERROR):
        gained, wrong = recurrent_fuzz.run(range(part * PART, (part + 1) * PART))
    assert wrong == {}
    assert gained >= PART // 5
