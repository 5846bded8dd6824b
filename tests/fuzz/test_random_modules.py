"""200 random LightningModules an accelerator: equal to plain training where it is neutral, trained where it is not."""

import pytest
from accelerators_table import TABLE
from modules import check


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 20))
@pytest.mark.parametrize("accelerator", TABLE)
@pytest.mark.filterwarnings("ignore")
def test_random_modules_train_as_they_should(accelerator, first):
    results = {seed: check(accelerator, seed) for seed in range(first, first + 20)}
    assert {seed: found for seed, (found, _) in results.items() if found} == {}
    assert any(what == "acted" for _, what in results.values())
