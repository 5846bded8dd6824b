"""The suite ``projection`` of ``lightning-accel bench``."""

from collections import Counter

import pytest
import torch

from lightning_accel.bench.plain_projections import SHAPES, plain_projection
from lightning_accel.bench.suites import projection
from lightning_accel.projection import project_l1inf, radius_for_sparsity


@pytest.mark.slow
def test_quick_run_has_every_row_with_both_times():
    rows = list(projection.rows(quick=True, device="cpu"))
    for row in rows:
        assert set(row.seconds) == {row.baseline, row.variant}, row
        assert all(seconds > 0 for seconds in row.seconds.values())
        assert row.ratio.low <= row.ratio.median <= row.ratio.high
    assert len({(row.case, row.variant) for row in rows}) == len(rows)
    default = [row for row in rows if row.better == "at most" and row.target is not None]
    eager = [row for row in rows if ", eager" in row.variant]
    assert Counter(row.target for row in default) == {
        1.03: 2,
        1.3: 2,
        1.5: 2,
        3.0: 4,
        5.0: 4,
        4.0: 4,
        2.0: 4,
        2.5: 4,
        0.6: 2,
    }
    bilevel = [row for row in default if "bi-level" in row.variant]
    assert len(eager) == len(bilevel), "the same rows without a compiler"
    assert all(row.target is None for row in eager)
    assert [row.target for row in rows if row.baseline == "plain torch"] == [1.0] * 6
    assert [row.target for row in rows if row.baseline == "with zeros"][:2] == [2.0, 5.0]


@pytest.mark.parametrize("case", [case for case in SHAPES if "embedding" not in case])
def test_plain_torch_is_given_the_same_task(case):
    shape, dims = SHAPES[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    radius = radius_for_sparsity(x, 0.5, dims)
    torch.testing.assert_close(plain_projection(x.clone(), radius, dims), project_l1inf(x, radius, dims))
