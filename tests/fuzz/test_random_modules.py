"""200 random LightningModules an accelerator: equal to plain training where it is neutral, trained where it is not."""

import pytest
from accelerators_table import TABLE
from modules import check


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", TABLE)  # varies first: all are held against the same plain fits
@pytest.mark.parametrize("first", range(0, 200, 20))
@pytest.mark.filterwarnings("ignore")
def test_random_modules_train_as_they_should(accelerator, first):
    results = {seed: check(accelerator, seed) for seed in range(first, first + 20, TABLE[accelerator].every)}
    assert {seed: found for seed, (found, _) in results.items() if found} == {}
    assert len(results) == 1 or any(what == "acted" for _, what in results.values())


FOUND = {
    "gradients of a chain of rank one below the rounding of its weights, under Adadelta": ("low_rank", 424),
    "layers that go back with one nobody uses, and are frozen before their next step": ("low_rank", 864),
    "factor whose mate was zero, with gradients below rounding, under SGD": ("low_rank", 1204),
    "layer that is skipped in every step in which one of its factors trains": ("low_rank", 1349),
    "average of weights that is the weight of the first step after layers went back": ("low_rank", 1963),
    "Adafactor by hand in mixed precision, whose plain steps are inside of autocast": ("async_sgd", 20),
    "optimizer that a parameter server refuses, by the words of a worker": ("async_sgd", 180),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FOUND)
@pytest.mark.filterwarnings("ignore")
def test_what_was_found_is_found_no_more(what):
    found, _ = check(*FOUND[what])
    assert found == []
