"""Asynchronous SGD on Ray: every row of the contract is run, or its reason not to be stands in a table.

All of them share one session of Ray.
"""

import inspect
from dataclasses import replace

import pytest
import test_row_05_composition as composition
from ray_fork_server import forked_workers
from ray_rows import ENTRY, REASONS, RUN, on_ray, rows_of

from lightning_accel.async_sgd.ray_engine import run
from lightning_accel.async_sgd.ray_engine.cluster import connected
from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.async_sgd.ray_engine.run import run_on_ray
from lightning_accel.strategies.for_lightning import AsyncSGDStrategy
from lightning_accel.strategies.for_pytorch_lightning import AsyncSGDStrategy as OtherAsyncSGDStrategy

ON_RAY = {"engine": "ray", "shards": 2, "heartbeat_seconds": 300.0}
RAY_ENTRY = replace(
    ENTRY,
    strategy=lambda: AsyncSGDStrategy(**ON_RAY),
    neutral_strategy=lambda: AsyncSGDStrategy(**ON_RAY),
    other_strategy=lambda: OtherAsyncSGDStrategy(**ON_RAY),
)
ROWS = rows_of(ENTRY)


@pytest.fixture(scope="module")
def ray():
    with pytest.MonkeyPatch.context() as patch, forked_workers(patch), connected(RayOptions(), cores=2) as found:
        yield found


def test_every_row_is_run_or_has_a_reason():
    assert len(ROWS) == 66, "a row came or went: say here whether it runs on Ray"
    assert sorted([*RUN, *REASONS]) == sorted(ROWS)
    assert all(len(reason.split()) >= 3 for reason in REASONS.values())


@pytest.mark.slow
@pytest.mark.parametrize("row", RUN)
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_row_holds_on_ray(row, ray, tmp_path, caplog, monkeypatch):
    # pairs look their entries up by name
    table = tuple(RAY_ENTRY if entry is ENTRY else entry for entry in composition.ACCELERATORS)
    monkeypatch.setattr(composition, "by_name", lambda name: next(entry for entry in table if entry.name == name))
    monkeypatch.setattr(composition, "COMPOSED", tuple(e for e in table if e.conf or e is RAY_ENTRY))
    fits = []

    def counted(*args, **kwargs):
        fits.append(row)
        return run_on_ray(*args, **kwargs)

    monkeypatch.setattr(run, "run_on_ray", counted)
    function, arguments = ROWS[row]
    own = {"tmp_path": tmp_path, "caplog": caplog}
    wanted = inspect.signature(function).parameters
    function(**on_ray(arguments, RAY_ENTRY), **{name: value for name, value in own.items() if name in wanted})
    assert fits, "something was trained on Ray"
