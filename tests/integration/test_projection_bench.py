"""The suite ``projection`` of ``lightning-accel bench``."""

from collections import Counter

import pytest

from lightning_accel.bench.suites import projection


@pytest.mark.slow
def test_quick_run_has_every_row_with_both_times():
    rows = list(projection.rows(quick=True, device="cpu"))
    for row in rows:
        assert set(row.seconds) == {row.baseline, row.variant}, row
        assert all(seconds > 0 for seconds in row.seconds.values())
        assert row.ratio.low <= row.ratio.median <= row.ratio.high
    assert len({(row.case, row.variant) for row in rows}) == len(rows)
    default = [row for row in rows if row.better == "at most" and row.target is not None]
    compiled = [row for row in rows if ", compiled" in row.variant]
    assert Counter(row.target for row in default) == {1.03: 1, 1.3: 2, 1.5: 2, 3.0: 4, 6.0: 4, 4.0: 4, 2.5: 8, 0.6: 2}
    bilevel = [row for row in default if "bi-level" in row.variant]
    assert len(compiled) == len(bilevel), "the same rows with a compiler at once"
    assert all(row.target is None for row in compiled)
    assert [row.target for row in rows if row.baseline == "with zeros"][:2] == [2.0, 5.0]
