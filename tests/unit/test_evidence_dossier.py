"""Results gathered into one page, and what is said of the free alternatives."""

import html
import json

import pytest
from evidence_rows import two_arms

from lightning_accel.evidence.alternatives import advise
from lightning_accel.evidence.comparison import compare_runs
from lightning_accel.evidence.dossier.gather import gather, resumable
from lightning_accel.evidence.dossier.page import headline, write_dossier
from lightning_accel.evidence.goal import Goal
from lightning_accel.evidence.page import Report
from lightning_accel.evidence.summaries import write_summary, write_sweep_summary
from lightning_accel.evidence.sweeps.page import SweepReport
from lightning_accel.evidence.sweeps.runs import SweepRun, conclusion, settings_of, trade_off

GOAL = Goal("val/accuracy", "max", 0.88)
SETTINGS = {"model": "a.b.MLP", "data": "c.Digits", "command": "lightning-accel compare 'a=[x,y]' hydra.run.dir=old"}


def compared(plain, accelerated, **more):
    return compare_runs(two_arms(plain, accelerated), "plain", "accelerated", goal=GOAL, **more)


def comparison_folder(folder, plain, accelerated, advice="", **more):
    folder.mkdir()
    report = Report([compared(plain, accelerated, **more)], [], {"device": "chip"}, SETTINGS, advice=advice)
    write_summary(report, folder / "comparison.json")
    return folder


def sweep_folder(folder):
    folder.mkdir()
    runs = [SweepRun(str(i), (f"x={i}",), {"val/accuracy": 0.9 + i / 100, "samples_per_second": 10.0}) for i in (0, 1)]
    runs.append(SweepRun("2", ("x=2",), {}, "no memory"))
    settings = settings_of(runs, "val/accuracy", "samples_per_second")
    on, near = trade_off(settings, "max")
    said = conclusion(settings, "val/accuracy", "max")
    report = SweepReport(
        runs, settings, "val/accuracy", "max", "samples_per_second", on, near, said, {"device": "chip"}
    )
    write_sweep_summary(report, folder / "sweep.json")
    return folder


def test_a_page_says_of_every_result_what_it_shows_and_what_to_do(tmp_path):
    faster = comparison_folder(tmp_path / "a", [10] * 6, [5] * 6, price_per_hour=3.0)
    slower = comparison_folder(tmp_path / "b", [10] * 6, [20] * 6)
    few = comparison_folder(tmp_path / "c", [10] * 2, [5] * 2)
    findings = gather([faster, slower, few, sweep_folder(tmp_path / "d")])
    assert [finding.kind for finding in findings] == ["comparison"] * 3 + ["sweep"]
    assert findings[0].next_step == "Use it."
    assert findings[0].rows[0][0].startswith("until val/accuracy")  # time to the target first
    assert any(row[0] == "price of a fit" and "EUR" in row[1] for row in findings[0].rows)
    assert findings[1].next_step.startswith("Leave it out here")
    again = f"lightning-accel compare 'a=[x,y]' hydra.run.dir={few} compare.resume=true compare.pairs=6"
    assert again in findings[2].next_step
    assert findings[3].facts["failed jobs"] == "1"
    assert {"date", "torch", "device"} <= set(findings[0].facts)
    write_dossier(findings, tmp_path / "evidence.html")
    page = html.unescape((tmp_path / "evidence.html").read_text())
    for finding in findings:
        assert finding.title in page
        assert finding.verdict in page
        assert finding.next_step in page
    assert headline(findings) == "1 of 3 comparisons say that it pays here; 1 sweep."


def test_quality_that_is_not_shown_to_be_kept_is_no_reason_to_use_it(tmp_path):
    folder = comparison_folder(tmp_path / "a", [10] * 6, [5] * 6)
    plain = json.loads((folder / "comparison.json").read_text())
    for line in plain["comparisons"][0]["lines"]:
        if line["name"].startswith("final "):
            line["verdict"] = "not shown"
    (folder / "comparison.json").write_text(json.dumps(plain))
    assert gather([folder])[0].next_step.startswith("Faster, but quality is not shown")


def test_folders_without_results_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        gather([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="holds no result"):
        gather([tmp_path])


def test_a_resume_hint_keeps_the_words_and_their_quotes():
    assert resumable("lightning-accel compare 'a=[x,y]' compare.pairs=2") == "lightning-accel compare 'a=[x,y]'"


def arms(**seconds):
    def named(baseline, candidate):
        runs = two_arms(seconds[baseline], seconds[candidate])
        return compare_runs({baseline: runs["plain"], candidate: runs["accelerated"]}, baseline, candidate, goal=None)

    others = [name for name in seconds if name not in ("plain", "accelerated")]
    own = [named(name, "accelerated") for name in ("plain", *others)]
    return advise(own, [named("plain", name) for name in others])


def test_a_free_alternative_that_does_as_much_is_all_that_is_needed():
    assert "it is all that this run needs" in arms(plain=[10] * 6, accelerated=[6] * 6, fused=[6] * 6)
    assert "the accelerators are 2.00 times as fast as that" in arms(plain=[10] * 6, accelerated=[3] * 6, fused=[6] * 6)
    assert arms(plain=[10] * 6, accelerated=[3] * 6, fused=[11] * 6).startswith("No free alternative")
    assert arms(plain=[10] * 6, accelerated=[3] * 6) == ""
