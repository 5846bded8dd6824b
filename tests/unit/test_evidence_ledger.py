import csv
import json

import pytest
from evidence_rows import run

from lightning_accel.evidence.measured_runs.ledger import RunLedger
from lightning_accel.evidence.measured_runs.pairs import Step, schedule
from lightning_accel.evidence.measured_runs.runs import Run


def _ledger(folder, **changes):
    return RunLedger(folder, **{"fingerprint": "f", **changes})


def test_every_row_is_on_disk_at_once_and_comes_back(tmp_path):
    ledger = _ledger(tmp_path / "new" / "folder")
    rows = [run(arm, pair) for pair in (0, 1) for arm in ("plain", "accelerated")]
    for number, row in enumerate(rows, start=1):
        ledger.append(row)
        assert len(ledger.path.read_text().splitlines()) == number
    assert _ledger(ledger.folder, resume=True).runs == rows


def test_former_rows_are_not_mixed_with_new_ones(tmp_path):
    _ledger(tmp_path).append(run())
    before = (tmp_path / "runs.jsonl").read_text()
    with pytest.raises(
        FileExistsError, match=r"holds the rows of a former comparison; choose another folder .*resume=true"
    ):
        _ledger(tmp_path)
    assert (tmp_path / "runs.jsonl").read_text() == before


def test_rows_of_other_settings_are_not_continued(tmp_path):
    _ledger(tmp_path).append(run())
    with pytest.raises(ValueError, match="holds rows of other settings"):
        _ledger(tmp_path, fingerprint="g", resume=True)


def test_row_cut_off_by_a_crash_is_dropped_and_the_rest_kept(tmp_path):
    ledger = _ledger(tmp_path)
    ledger.append(run(pair=0))
    with ledger.path.open("a") as lines:
        lines.write('{"arm": "pla')
    again = _ledger(tmp_path, resume=True)
    again.append(run(pair=1))
    assert [r.pair for r in _ledger(tmp_path, resume=True).runs] == [0, 1]


def test_broken_rows_are_named(tmp_path):
    ledger = _ledger(tmp_path)
    ledger.append(run())
    ledger.path.write_text("{}\n" + ledger.path.read_text())
    with pytest.raises(ValueError, match=r"line 1 of `.*runs.jsonl` is not a row: a row has missing or unknown fields"):
        _ledger(tmp_path, resume=True)
    ledger.path.write_text("nonsense\n{}\n")
    with pytest.raises(ValueError, match=r"line 1 of `.*runs.jsonl` is not a row"):
        _ledger(tmp_path, resume=True)


def test_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file/below"):
        _ledger(tmp_path / "file" / "below")


def test_resuming_nothing_is_a_start(tmp_path):
    assert _ledger(tmp_path, resume=True).runs == []


def test_only_complete_pairs_count_and_interrupted_ones_are_not_patched(tmp_path):
    ledger = _ledger(tmp_path)
    for row in (run("a", -1), run("a", 0), run("b", 0), run("b", 1), run("b", 2), run("a", 2), run("a", 3)):
        ledger.append(row)
    pairs = ledger.complete_pairs(["a", "b"])
    assert [r.pair for r in pairs["a"]] == [r.pair for r in pairs["b"]] == [0, 2]
    assert ledger.next_pair() == 4


def test_exports_hold_every_row(tmp_path):
    ledger = _ledger(tmp_path)
    ledger.append(run("plain", -1))
    ledger.append(run("plain", 0, metrics={"val/accuracy": None, "other": 1.5}))
    as_json, as_csv = ledger.export()
    assert json.loads(as_json.read_text()) == [r.to_dict() for r in ledger.runs]
    with as_csv.open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [r["pair"] for r in rows] == ["-1", "0"]
    assert rows[1]["metrics/other"] == "1.5"
    assert rows[0]["phase_seconds/forward"] == str(10.0 / 300)


def test_schedule_warms_up_and_shuffles_within_pairs():
    steps = schedule(["a", "b", "c"], pairs=30, seed=1)
    assert steps[:3] == [Step("a", -1, 0), Step("b", -1, 1), Step("c", -1, 2)]
    by_pair = [[s for s in steps if s.pair == pair] for pair in range(30)]
    assert all(sorted(s.arm for s in pair) == ["a", "b", "c"] for pair in by_pair)
    assert all([s.order for s in pair] == [0, 1, 2] for pair in by_pair)
    assert len({tuple(s.arm for s in pair) for pair in by_pair}) == 6
    assert schedule(["a", "b", "c"], pairs=30, seed=1) == steps
    assert schedule(["a", "b", "c"], pairs=30, seed=2) != steps


def test_resumed_schedule_continues_the_order():
    whole = schedule(["a", "b"], pairs=6, seed=4)
    assert schedule(["a", "b"], pairs=2, first_pair=4, seed=4)[2:] == [s for s in whole if s.pair >= 4]


def test_schedule_is_checked():
    with pytest.raises(ValueError, match=r"`pairs` must be >= 1, got 0; 6 is the least that can decide"):
        schedule(["a", "b"], pairs=0)
    for arms in (["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="`arms` must be two or more of different names"):
            schedule(arms, pairs=1)


def test_rows_of_another_version_are_refused():
    with pytest.raises(ValueError, match=r"missing or unknown fields \(steps\)"):
        Run.from_dict({k: v for k, v in run().to_dict().items() if k != "steps"})
