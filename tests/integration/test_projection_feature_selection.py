"""The papers' experiment: what is trained, counted, summarized, measured and drawn."""

import json
import re
import sys

import pytest
import torch
from cli_calls import call
from lightning.pytorch import Trainer

from lightning_accel.callbacks import L1InfProjection
from lightning_accel.evidence.feature_selection.overhead import measure_overhead
from lightning_accel.evidence.feature_selection.page import SelectionReport, write_selection_page
from lightning_accel.evidence.feature_selection.plots import plot_accuracy_against_features, plot_weights
from lightning_accel.evidence.feature_selection.study import (
    CONTROLS,
    KEPT_WEIGHTS,
    PLAIN,
    Selection,
    headline,
    select_features,
    sparsest_without_loss,
    summarize,
    write_runs,
)
from lightning_accel.evidence.plots import MissingPackageError
from lightning_accel.zoo import Classification, SupervisedAutoencoder


def make(seed, callbacks, epochs=4):
    torch.manual_seed(seed)
    trainer = Trainer(
        max_epochs=epochs,
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
def trained():
    return list(
        select_features(
            make, L1InfProjection, parameter="encoder.0.weight", sparsities=[0.8], retrain_epoch=2, seeds=[0, 1]
        )
    )


@pytest.fixture(scope="module")
def runs(trained):
    return [t.selection for t in trained]


def selection(method, sparsity, accuracy, features=10):
    return Selection(method, sparsity, 0, accuracy, features, None)


def test_methods_are_compared_at_equal_sparsity_under_equal_seeds(trained, runs):
    assert [(s.method, s.seed) for s in runs] == [
        (method, seed) for seed in (0, 1) for method in (PLAIN, "bi-level", "exact", KEPT_WEIGHTS, *CONTROLS)
    ]
    assert [s.features for s in runs] == [60, 12, 12, 12, 12, 12] * 2
    for found in trained:
        assert int((found.weight != 0).any(0).sum()) == found.selection.features
        assert len(found.informative) == 8
        assert 0.5 < found.selection.accuracy <= 1.0 or found.selection.method == "random"
    by_chance = 12 * 8 / 60
    assert all(s.informative > by_chance for s in runs if s.method != "random"), runs


def test_controls_keep_other_columns_and_train_from_the_same_start(trained):
    first = {t.selection.method: t.weight for t in trained if t.selection.seed == 0}
    kept = {method: frozenset(torch.nonzero((w != 0).any(0))[:, 0].tolist()) for method, w in first.items()}
    assert kept[KEPT_WEIGHTS] == kept["bi-level"], "one projection has chosen both"
    assert not torch.equal(first[KEPT_WEIGHTS], first["bi-level"])
    assert kept["random"] != kept["bi-level"]
    again = list(
        select_features(
            make, L1InfProjection, parameter="encoder.0.weight", sparsities=[0.8], retrain_epoch=2, seeds=[0]
        )
    )
    assert torch.equal(again[-1].weight, first["random"]), "the random choice is the seed's"


def test_without_an_epoch_to_retrain_every_step_is_projected():
    _, bilevel, exact = select_features(
        make, L1InfProjection, parameter="encoder.0.weight", sparsities=[0.5], retrain_epoch=None, seeds=[0]
    )
    assert bilevel.selection.features == exact.selection.features == 30


def test_summaries_hold_means_spreads_and_paired_differences_and_reach_the_disk(runs, tmp_path):
    summaries = summarize(runs)
    methods = ("bi-level", "exact", KEPT_WEIGHTS, *CONTROLS)
    assert [(s.method, s.features) for s in summaries] == [(PLAIN, 60.0), *((method, 12.0) for method in methods)]
    others = headline(summaries).partition("The same training with other masks")[2]
    assert all(f"({method})" in others for method in (KEPT_WEIGHTS, *CONTROLS))
    assert summaries[0].difference.median == 0.0
    assert summaries[0].informative == 8.0
    assert summaries[1].by_chance == pytest.approx(12 * 8 / 60)
    plain, exact = ([s.accuracy for s in runs if s.method == method] for method in (PLAIN, "exact"))
    assert summaries[2].accuracy[0] == pytest.approx(sum(exact) / 2)
    assert summaries[2].accuracy[1] == pytest.approx(abs(exact[0] - exact[1]) / 2**0.5)
    assert summaries[2].difference.median == pytest.approx(sum(b - a for a, b in zip(plain, exact, strict=True)) / 2)
    write_runs(runs, tmp_path / "runs.json")
    assert [Selection(**row) for row in json.loads((tmp_path / "runs.json").read_text())] == runs


@pytest.mark.parametrize(("at_90", "shown"), [(0.8, 0.9), (0.69, 0.5), (0.7, 0.9)])
def test_sparsest_without_loss_is_where_no_method_loses(at_90, shown):
    found = [selection(PLAIN, 0.0, 0.7, features=100)]
    for sparsity, accuracy, features in ((0.5, 0.75, 50), (0.9, at_90, 10)):
        found += [selection("bi-level", sparsity, 0.8, features=features)]
        found += [selection("exact", sparsity, accuracy, features=features)]
    assert sparsest_without_loss(summarize(found)) == shown
    kept = {0.5: 50, 0.9: 10}[shown]
    assert headline(summarize(found)).startswith(f"Test accuracy with {kept} of 100 features: 0.800 (bi-level, undecid")


def test_sparsest_without_loss_is_the_least_loss_where_all_lose():
    found = [selection(PLAIN, 0.0, 0.9), selection("exact", 0.5, 0.8), selection("exact", 0.9, 0.85)]
    assert sparsest_without_loss(summarize(found)) == 0.9


def test_runs_without_a_baseline_are_refused(runs):
    with pytest.raises(ValueError, match=r"without projection for every seed, got none for \[0, 1\]"):
        summarize([run for run in runs if run.method != PLAIN])


def test_overhead_is_measured_between_neighbouring_steps():
    found = list(measure_overhead(make, L1InfProjection, parameter="encoder.0.weight", sparsities=[0.5], seed=0))
    assert [(o.method, o.sparsity) for o in found] == [("bi-level", 0.5), ("exact", 0.5)]
    for overhead in found:
        # 4 epochs of 6 steps: the first of each has no batch before it, the first 4 steps warm up
        assert overhead.ratio.pairs == 1 + 3 * 2
        assert overhead.seconds > 0.0
        assert 0.5 < overhead.ratio.median < 50.0


def test_overhead_of_fits_that_are_too_short_is_refused():
    def short(seed, callbacks):
        trainer, model, data = make(seed, callbacks, epochs=1)
        trainer.limit_train_batches = 3
        return trainer, model, data

    with pytest.raises(ValueError, match="to compare neighbours, got 3 steps in 1 epochs"):
        list(measure_overhead(short, L1InfProjection, parameter="encoder.0.weight", sparsities=[0.5], seed=0))


@pytest.mark.parametrize("known", [True, False])
def test_pictures_and_page_hold_all_of_it(trained, runs, known, tmp_path):
    if not known:
        runs = [Selection(**(vars(run) | {"informative": None})) for run in runs]
    summaries = summarize(runs)
    plot_accuracy_against_features(summaries, tmp_path / "accuracy.png")
    shown = {t.selection.method: t.weight for t in trained[:3]}
    plot_weights(shown, tmp_path / "weights.png", informative=trained[0].informative if known else None)
    pictures = {"Accuracy": tmp_path / "accuracy.png", "Weights": tmp_path / "weights.png"}
    for path in pictures.values():
        assert path.read_bytes().startswith(b"\x89PNG")
    report = SelectionReport(summaries, [], runs, {"threads": 1}, {"model": "<SAE>"})
    write_selection_page(report, tmp_path / "report.html", pictures=pictures)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;SAE&gt;" in page
    assert headline(summaries).replace(" ", "") in page.replace(" ", "")
    assert ("by chance" in page) == known
    assert page.count("<tr>") == 1 + 6 + 1 + 12


def test_missing_packages_are_named(runs, monkeypatch, tmp_path):
    summaries = summarize(runs)
    report = SelectionReport(summaries, [], runs, {})
    for name in ("matplotlib.figure", "jinja2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingPackageError, match=r"pictures need matplotlib: pip install 'lightning-accel\[examples\]'"
    ):
        plot_accuracy_against_features(summaries, tmp_path / "x.png")
    with pytest.raises(MissingPackageError, match=r"the page needs jinja2: pip install 'lightning-accel\[examples\]'"):
        write_selection_page(report, tmp_path / "x.html", pictures={})


SMALL = [
    "experiment=sae_synthetic",
    "data.samples=300",
    "data.features=40",
    "data.informative=6",
    "model.hidden_size=10",
    "trainer.max_epochs=4",
    "selection.retrain_epoch=2",
    "selection.sparsities=[0.5,0.75]",
    "compare.pairs=2",
]


def test_compare_prints_the_table_and_writes_pictures_and_page(capsys, tmp_path):
    assert call("compare", *SMALL, f"hydra.run.dir={tmp_path}") == 0
    out = capsys.readouterr().out
    rows = re.findall(
        r"^(no projection|not rewound|bi-level|exact|magnitude|random) +(\d+)% +(\d+) ", out, re.MULTILINE
    )
    assert rows == [
        ("no projection", "0", "40"),
        *((method, "50", "20") for method in ("bi-level", "exact", KEPT_WEIGHTS, *CONTROLS)),
        *((method, "75", "10") for method in ("bi-level", "exact", KEPT_WEIGHTS, *CONTROLS)),
    ]
    assert len(re.findall(r"[+-]\d+\.\d %", out)) == 4
    names = {"feature_selection.json", "accuracy_against_features.png", "weights.png", "report.html"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    assert str(tmp_path) not in (tmp_path / "report.html").read_text()


def test_compare_shows_what_was_trained_though_steps_are_too_few_to_time(capsys, tmp_path):
    words = ["+trainer.limit_train_batches=2", "compare.pairs=1", f"hydra.run.dir={tmp_path}"]
    assert call("compare", *SMALL[:-1], *words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Time of a step is not measured: a fit must have epochs of at least 3 steps" in out
    assert "exact 75% 10" in out
    assert "from batch to batch; measured" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("selection.sparsities=[0.5,1.5]", "`selection.sparsities` must be fractions in (0, 1), got [0.5, 1.5]"),
        ("selection.sparsities=[]", "`selection.sparsities` must be fractions in (0, 1), got []"),
        ("selection.retrain_epoch=4", "`selection.retrain_epoch` must be in [1, 3]"),
        ("compare.pairs=0", "`compare.pairs` must be an integer >= 1, got 0"),
        ("~data", "There is no data to select features of"),
    ],
)
def test_compare_refuses_what_can_not_be_studied(word, match, capsys):
    words = [w for w in SMALL if w.partition("=")[0] != word.partition("=")[0]]
    if word == "~data":
        words = [w for w in words if not w.startswith("data.")]
    assert call("compare", *words, word) == 2
    assert match in " ".join(capsys.readouterr().err.split())
