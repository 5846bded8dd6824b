"""Row 10: which callback stands where in the list makes no difference: a wrong order is corrected."""

import itertools

import pytest
from accelerators import ACCELERATORS
from contract_models import ContractModule, classification_data, loader
from contract_runs import assert_equal_modules, trainer

from lightning_accel.callbacks.order import ORDER

WITH_CALLBACKS = [entry for entry in ACCELERATORS if entry.callbacks() and entry.conf]


def fit_in_order(callbacks, folder):
    module = ContractModule("everything")
    runner = trainer(folder, callbacks, max_epochs=2)
    runner.fit(module, loader(classification_data()), loader(classification_data()))
    return module


@pytest.mark.parametrize(
    ("one", "other"),
    [pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name}") for pair in itertools.combinations(WITH_CALLBACKS, 2)],
)
def test_both_orders_train_alike(one, other, tmp_path):
    right = fit_in_order([*one.callbacks(), *other.callbacks()], tmp_path)
    wrong = fit_in_order([*other.callbacks(), *one.callbacks()], tmp_path)
    assert_equal_modules(right, wrong)
    for entry in (one, other):
        assert entry.acted(right), entry.name


def test_the_table_has_no_circle():
    first_of = {later: {first for first, other in ORDER if other == later} for _, later in ORDER}
    names = {name for pair in ORDER for name in pair}
    while names:
        free = {name for name in names if not first_of.get(name, set()) & names}
        assert free, f"no order satisfies {names}"
        names -= free
