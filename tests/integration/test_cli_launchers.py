"""Sweeps in other processes: by joblib on this machine, by Ray on a cluster of one machine."""

import csv
import json
import os
from pathlib import Path

import optuna
import pytest
from cli_calls import SMALL, call

from lightning_accel.cli.sweep.launch_elsewhere import disconnect

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")]
SWEEP = ["train", *SMALL, "logger=[]", "monitoring=[]", "test=false", "optimized_metric=val/accuracy"]
MODULE = """
import os, signal
from lightning.pytorch import Callback

class NoteProcess(Callback):
    def on_fit_start(self, trainer, pl_module):
        open(f"process-{os.getpid()}", "a").close()

class Die(Callback):
    def __init__(self, width):
        self.width = width
    def on_train_start(self, trainer, pl_module):
        if self.width == 8:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=["joblib", "ray"])
def launcher(request, monkeypatch):
    Path("user_callbacks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(os.getcwd())
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    yield [f"hydra/launcher={request.param}", *(["hydra.launcher.n_jobs=2"] if request.param == "joblib" else [])]
    disconnect()


def rows():
    (table,) = Path("outputs/train-sweep").rglob("sweep.csv")
    with table.open() as file:
        return list(csv.DictReader(file))


def test_jobs_run_elsewhere_and_end_in_one_table_as_those_that_run_here(launcher):
    note = "+callbacks.note._target_=user_callbacks.NoteProcess"
    assert (
        call(*SWEEP, "-m", "model.width=8,16", "model.depth=1,-1", note, *launcher) == 2
    )  # as where they run here: a job could not be built
    found = rows()
    assert len(found) == 4
    assert sum("`depth` must be an integer >= 1, got -1" in row["failure"] for row in found) == 2
    processes = {int(path.name.partition("-")[2]) for path in Path().glob("process-*")}
    assert processes
    assert os.getpid() not in processes
    elsewhere = {row["overrides"]: row["val/accuracy"] for row in found if row["val/accuracy"]}
    assert call(*SWEEP, "-m", "model.width=8,16", note, "hydra.sweep.dir=here") == 0
    here = [json.loads(path.read_text())["metrics"] for path in Path("here").rglob("metrics.json")]
    assert sorted(map(float, elsewhere.values())) == sorted(each["val/accuracy"] for each in here)


def test_a_search_goes_on_past_a_trial_whose_process_dies(launcher):
    words = ["sweep=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=2", "hydra.sweeper.study_name=mine"]
    die = ["+callbacks.die._target_=user_callbacks.Die", "+callbacks.die.width=${model.width}"]
    monitoring = [word for word in SWEEP if not word.startswith("model.width")]
    assert call(*monitoring, *words, "model.width=8,16,32", *die, *launcher) == 0
    trials = optuna.load_study(study_name="mine", storage="sqlite:///outputs/optuna.db").trials
    assert {trial.params["model.width"]: trial.state.name for trial in trials} == {
        8: "FAIL",
        16: "COMPLETE",
        32: "COMPLETE",
    }
    assert sum("its process ended before it did" in row["failure"] for row in rows()) == 1


def test_settings_that_can_not_be_met_are_refused(launcher, capsys):
    if "hydra/launcher=ray" not in launcher:
        assert call(*SWEEP, "-m", "model.width=8,16", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0") == 2
        assert "`hydra.launcher.n_jobs` must be an integer >= 1, or -1 for all cores, got 0" in capsys.readouterr().err
        return
    assert call(*SWEEP, "-m", "model.width=8,16", *launcher, "hydra.launcher.gpus_per_job=64") == 2
    assert "a job asks for 1 cores and 64 GPUs, this machine has" in capsys.readouterr().err
