"""Row 4: two DDP processes hold equal parameters after several phases, or the run is refused in `setup`."""

import re

import pytest
import torch
from accelerators import cases
from contract_clocks_worker import fit_with_a_clock
from contract_ddp_worker import fit_as_a_rank
from contract_processes import run_two_processes


@pytest.mark.slow
@pytest.mark.parametrize("entry", cases(lambda entry: entry.strategy() == "auto"))
def test_two_processes_stay_equal_or_are_refused(entry, tmp_path):
    one, other = run_two_processes(fit_as_a_rank, entry.name, tmp_path)
    if entry.ddp_refusal is not None:
        assert re.search(entry.ddp_refusal, one["error"]), one["error"]
        assert re.search(entry.ddp_refusal, other["error"]), other["error"]
        return
    assert "error" not in one, one["error"]
    assert "error" not in other, other["error"]
    assert one["acted"]
    assert other["acted"]
    assert one["in optimizer"]
    assert list(one["state"]) == list(other["state"])
    for name, value in one["state"].items():
        if "running_" in name:
            continue  # batch norm's statistics are those of each process's own batches, in plain DDP too
        assert torch.equal(value, other["state"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("says_faster", ["0", "1"], ids=lambda rank: f"rank{rank}-says-faster")
def test_processes_whose_clocks_differ_decide_alike(says_faster, tmp_path):
    one, other = run_two_processes(fit_with_a_clock, says_faster, tmp_path)
    assert "error" not in one, one["error"]
    assert one["ranks"] == other["ranks"], "rank 0 measures, all obey"
    assert bool(one["ranks"]) == (says_faster == "0")
    assert list(one["state"]) == list(other["state"])
    assert all(torch.equal(value, other["state"][name]) for name, value in one["state"].items())
