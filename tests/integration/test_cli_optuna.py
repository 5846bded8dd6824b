"""``sweep=optuna``: kept on disk, goes on after any end, a failed trial is one, bad ones are stopped early."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from cli_calls import SMALL, call, folders
from optuna.trial import TrialState

from lightning_accel.cli.sweep.search import ended
from lightning_accel.cli.sweep.stop_bad_trial import StopBadTrial

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
STORAGE = "sqlite:///outputs/optuna.db"
FIXED = [
    *[word for word in SMALL if not word.startswith("model.")],
    *("sweep=optuna", "logger=[]", "test=false", "monitoring=[]"),
]


def search(*words):
    return call("train", "model.width=choice(8,16)", *FIXED, "hydra.sweeper.study_name=mine", *words)


def study(name="mine"):
    return optuna.load_study(study_name=name, storage=STORAGE)


def states(name="mine"):
    return [trial.state.name for trial in study(name).trials]


def test_a_search_goes_on_to_its_number_of_trials_and_stops_what_is_worse_than_the_median():
    assert search("hydra.sweeper.n_trials=1") == 0
    (first,) = study().trials
    assert first.state == TrialState.COMPLETE
    assert sorted(first.intermediate_values) == [0, 1]  # both epochs of debug=limit
    assert first.value == first.intermediate_values[1]
    assert search("hydra.sweeper.n_trials=1") == 0  # nothing is left to do
    assert len(study().trials) == 1

    for _ in range(5):  # better than can be reached
        study().add_trial(
            optuna.create_trial(
                params=first.params, distributions=first.distributions, value=2.0, intermediate_values={0: 2.0, 1: 2.0}
            )
        )
    assert search("hydra.sweeper.n_trials=7") == 0
    assert states() == ["COMPLETE"] * 6 + ["PRUNED"]
    assert sorted(study().trials[-1].intermediate_values) == [0]


def test_a_failed_trial_is_a_failed_trial_and_the_table_says_why(capsys):
    words = ["model.width=8", "model.depth=1,-1", *FIXED, "hydra/sweeper/sampler=grid", "hydra.sweeper.study_name=mine"]
    assert call("train", *words) == 0
    assert sorted(states()) == ["COMPLETE", "FAIL"]
    said = capsys.readouterr().out
    assert "`depth` must be an integer >= 1, got -1" in said
    (folder,) = (path for path in Path("outputs/train-sweep").iterdir())
    assert folder.name == "mine"
    with (folder / "sweep.csv").open() as file:
        assert sum("`depth` must be" in row["failure"] for row in csv.DictReader(file)) == 1
    assert (folder / "sweep.html").exists()


def test_a_search_whose_trials_all_fail_fails_with_the_reason(capsys):
    assert search("model.depth=-1", "hydra.sweeper.n_trials=2") == 2
    assert states() == ["FAIL", "FAIL"]
    assert "all 2 trials failed; the last: `model`" in capsys.readouterr().err


def test_too_many_failures_end_a_search_where_that_is_asked(capsys):
    assert search("model.depth=-1", "hydra.sweeper.max_failure_rate=0.5") == 2
    assert states() == ["FAIL"]
    assert "max_failure_rate=0.5 allows" in capsys.readouterr().err


def test_a_search_in_memory_prunes_through_the_trial_itself():
    assert search("hydra.sweeper.n_trials=2", "hydra.sweeper.storage=null", "hydra.sweeper.n_jobs=2") == 0
    assert len(list(Path("outputs/train-sweep/mine").glob("*/metrics.json"))) == 2
    assert not Path("outputs/optuna.db").exists()


def test_a_search_can_be_kept_in_a_journal_that_machines_share():
    assert search("hydra.sweeper.n_trials=1", "'hydra.sweeper.storage=journal:outputs/search.log'".strip("'")) == 0
    assert Path("outputs/search.log").stat().st_size > 0


def test_settings_out_of_range_are_refused(capsys):
    assert search("hydra.sweeper.n_trials=0") == 2
    assert "`hydra.sweeper.n_trials` must be an integer >= 1, got 0" in capsys.readouterr().err
    assert search("hydra.sweeper.max_failure_rate=2") == 2


@pytest.mark.slow
def test_a_killed_search_goes_on_by_the_same_command_and_loses_no_trial():
    words = ["model.width=choice(8,16,24)", *FIXED, "hydra.sweeper.n_trials=4"]
    command = [sys.executable, "-m", "lightning_accel.cli", "train", *words]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(Path("outputs").glob("train-sweep/*/*/metrics.json"))) < 2:
        assert run.poll() is None, "the search ended before it could be killed"
        time.sleep(0.02)  # the files of another process are the event that is waited for
    os.kill(run.pid, signal.SIGKILL)
    run.wait(timeout=30)

    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    (folder,) = Path("outputs/train-sweep").iterdir()
    (name,) = optuna.get_all_study_names(STORAGE)
    assert folder.name == name  # the same words name the same study
    whole = study(name)
    assert len(ended(whole)) == 4
    assert all(trial.state == TrialState.COMPLETE for trial in ended(whole))
    lost = [trial for trial in whole.trials if trial.state == TrialState.FAIL]
    for trial in lost:  # tried again, once; not if it died before it had values
        again = [t.params for t in whole.trials if t.user_attrs.get("again") == trial.number]
        assert again == ([trial.params] if trial.params else [])
    with (folder / "sweep.csv").open() as file:
        jobs = {row["job"] for row in csv.DictReader(file)}
    assert jobs >= {str(trial.number) for trial in ended(whole)}
    assert "of 4 trials already" in done.stdout + done.stderr


def test_a_metric_must_be_named():
    with pytest.raises(ValueError, match="`metric` must name a logged metric"):
        StopBadTrial("")


def test_other_multiruns_do_not_report_to_a_study():
    assert call("train", "-m", "seed=1,2", *[w for w in FIXED if w != "sweep=optuna"], "model.width=8") == 0
    assert len(list(folders("train-sweep")[0].glob("*/metrics.json"))) == 2
