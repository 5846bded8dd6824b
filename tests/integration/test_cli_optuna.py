"""``sweep=optuna``: kept on disk, resumed, bad trials stopped early."""

import os
from pathlib import Path

os.environ["SQLALCHEMY_SILENCE_UBER_WARNING"] = "1"  # Optuna 2 uses what SQLAlchemy 2 removed; both are pinned

import optuna
import pytest
from cli_calls import SMALL, call

from lightning_accel.cli.trials import StopBadTrial

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::optuna.exceptions.ExperimentalWarning"
)
STORAGE = "sqlite:///outputs/optuna.db"


def search(*words):
    fixed = [word for word in SMALL if not word.startswith("model.width")]
    return call(
        "train",
        "sweep=optuna",
        "model.width=choice(8,16)",
        *fixed,
        *("logger=[]", "test=false", "monitoring=[]", "hydra.sweeper.study_name=mine"),
        *words,
    )


def trials():
    return optuna.load_study(study_name="mine", storage=STORAGE).trials


def test_a_search_is_kept_resumed_and_stops_what_is_worse_than_the_median():
    assert search("hydra.sweeper.n_trials=1") == 0
    (first,) = trials()
    assert first.state == optuna.trial.TrialState.COMPLETE
    assert sorted(first.intermediate_values) == [0, 1]  # both epochs of debug=limit
    assert first.value == first.intermediate_values[1]

    study = optuna.load_study(study_name="mine", storage=STORAGE)
    for _ in range(5):  # better than can be reached
        study.add_trial(
            optuna.create_trial(
                params=first.params, distributions=first.distributions, value=2.0, intermediate_values={0: 2.0, 1: 2.0}
            )
        )
    assert search("hydra.sweeper.n_trials=1") == 0
    assert len(trials()) == 7
    assert sorted(trials()[-1].intermediate_values) == [0]
    assert not list(Path("outputs").glob("train/*"))


def test_a_study_in_memory_can_not_be_reported_to(capsys):
    assert search("hydra.sweeper.n_trials=1", "hydra.sweeper.storage=null", "hydra.sweeper.max_failure_rate=0") == 1
    assert "set hydra.sweeper.storage and study_name" in capsys.readouterr().err


def test_a_metric_must_be_named():
    with pytest.raises(ValueError, match="`metric` must name a logged metric"):
        StopBadTrial("")
