import pytest
from evidence_rows import run

from lightning_accel.evidence.budget import CALLBACKS, LOADING, REST, SETUP, VALIDATION, time_budget, write_budgets
from lightning_accel.evidence.tables import budget_table


def _stage(parameters, trained, steps, seconds):
    return {"parameters": parameters, "trained": trained, "steps": steps, "seconds": seconds}


def _run(scale=1.0, **changes):
    stages = [
        _stage(3_400_000, 3_400_000, 10, 1.0 * scale),
        _stage(1_700_000, 900_000, 20, 1.0 * scale),
        _stage(1_700_000, 1_700_000, 5, 0.5 * scale),
    ]
    values = {"setup_seconds": 0.5, "callback_seconds": 1.0, "validation_seconds": 2.0, "loading_seconds": 0.25}
    return run(**{"fit_seconds": 10.0, "stages": stages, **values, **changes})


def test_parts_add_up_to_the_mean_fit_in_the_order_of_time():
    shares = time_budget([_run(), _run(2.0, fit_seconds=14.0)])
    assert sum(share.seconds for share in shares) == pytest.approx(12.0)
    assert [share.name for share in shares] == [
        SETUP,
        "training 3.40M parameters",
        "training 900k of 1.70M parameters",
        "training 1.70M parameters",
        CALLBACKS,
        VALIDATION,
        LOADING,
        REST,
    ]
    assert [share.is_training for share in shares] == [False, True, True, True, False, False, False, False]
    seconds = {share.name: share.seconds for share in shares}
    assert seconds["training 3.40M parameters"] == pytest.approx(1.5)
    assert seconds[REST] == pytest.approx(12.0 - 0.5 - 1.0 - 2.0 - 0.25 - 3.75)
    assert shares[1].note == "10 steps of 150.0 ms"


def test_a_stage_that_some_runs_lack_counts_as_no_time_in_them():
    shares = time_budget([_run(), _run(stages=[_stage(3_400_000, 3_400_000, 10, 1.0)])])
    by_name = {share.name: share for share in shares}
    assert by_name["training 1.70M parameters"].seconds == pytest.approx(0.25)
    assert by_name["training 1.70M parameters"].note == "2 steps of 100.0 ms"


def test_rounding_never_makes_a_part_negative_and_no_runs_are_refused():
    assert time_budget([_run(fit_seconds=1.0)])[-1].seconds == 0.0
    with pytest.raises(ValueError, match="`runs` must hold at least one run"):
        time_budget([])


def test_training_in_other_processes_has_no_budget():
    assert write_budgets({"plain": [run()], "accelerated": [run()]}) == {}
    assert set(write_budgets({"plain": [run()], "accelerated": [_run()]})) == {"plain", "accelerated"}


def test_table_names_every_part_of_every_arm():
    budgets = write_budgets({"plain": [_run()], "accelerated": [_run(2.0)]})
    table = budget_table(budgets)
    assert table.row_count == 2 * 8
    assert list(table.columns[0].cells) == ["plain", *[""] * 7, "accelerated", *[""] * 7]
    assert list(table.columns[2].cells)[1] == "1.00 s"
    assert list(table.columns[3].cells)[1] == "10 %"


@pytest.mark.parametrize(("size", "text"), [(512, "512"), (25_400, "25.40k"), (123_456_789, "123M"), (2e9, "2.00G")])
def test_sizes_are_short(size, text):
    (share,) = [s for s in time_budget([_run(stages=[_stage(size, size, 1, 1.0)])]) if s.is_training]
    assert share.name == f"training {text} parameters"
