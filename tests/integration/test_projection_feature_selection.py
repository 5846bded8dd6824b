"""The papers' experiment: what is trained, counted, summarized and drawn."""

import json

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_accel.evidence.feature_selection import (
    PLAIN,
    Selection,
    plot_accuracy_against_features,
    plot_weights,
    select_features,
    summarize,
    write_runs,
)
from lightning_accel.zoo import Classification, SupervisedAutoencoder


def make(seed, callbacks):
    torch.manual_seed(seed)
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=list(callbacks),
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = SupervisedAutoencoder(in_features=60, hidden_size=20, lr=5e-3)
    return trainer, model, Classification(samples=300, features=60, informative=8, class_sep=2.0, seed=seed)


@pytest.fixture(scope="module")
def runs():
    found = select_features(make, parameter="encoder.0.weight", sparsities=[0.8], retrain_epoch=2, seeds=[0, 1])
    return list(found)


def test_methods_are_compared_at_equal_sparsity_under_equal_seeds(runs):
    selections = [run for run, _ in runs]
    assert [(s.method, s.seed) for s in selections] == [
        (method, seed) for seed in (0, 1) for method in (PLAIN, "bilevel", "exact")
    ]
    assert [s.features for s in selections] == [60, 12, 12] * 2
    for selection, weight in runs:
        assert int((weight != 0).any(0).sum()) == selection.features
        assert 0.5 < selection.accuracy <= 1.0
        assert selection.step_seconds > 0.0
    by_chance = 12 * 8 / 60
    assert all(s.informative > by_chance for s in selections), selections


def test_summaries_hold_means_and_spreads_and_reach_the_disk(runs, tmp_path):
    selections = [run for run, _ in runs]
    summaries = summarize(selections)
    assert [(s.method, s.features) for s in summaries] == [(PLAIN, 60.0), ("bilevel", 12.0), ("exact", 12.0)]
    assert summaries[0].step.median == 1.0
    assert summaries[0].informative == 8.0
    accuracies = [s.accuracy for s in selections if s.method == "exact"]
    assert summaries[2].accuracy[0] == pytest.approx(sum(accuracies) / 2)
    assert summaries[2].accuracy[1] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    write_runs(selections, tmp_path / "runs.json")
    assert [Selection(**row) for row in json.loads((tmp_path / "runs.json").read_text())] == selections
    plot_accuracy_against_features(summaries, tmp_path / "accuracy.png")
    plot_weights(runs[0][1], runs[2][1], tmp_path / "weights.png")
    for name in ("accuracy.png", "weights.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_runs_without_a_baseline_are_refused(runs):
    with pytest.raises(ValueError, match=r"without projection for every seed, got none for \[0, 1\]"):
        summarize([run for run, _ in runs if run.method != PLAIN])
