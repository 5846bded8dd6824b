import json

import pytest
from cli_calls import call, folders

from lightning_accel.bench.suites import suites, zoo
from lightning_accel.cli.compare.arms import plain_and_accelerated


def test_every_fit_of_the_zoo_composes_with_default_accelerators_and_without():
    for name in zoo._CUT:
        fits = plain_and_accelerated(name, zoo.overrides(name, "cpu"))
        assert [fit.accelerators for fit in fits.values()] == [False, True]
        callbacks = fits[True].config["callbacks"]
        assert list(callbacks) == ["rank_quantization", "sequential_freezing"]
        assert callbacks["rank_quantization"]["ratio"] is None  # the default of the class
        assert callbacks["rank_quantization"]["max_overhead"] == 0.03
    assert plain_and_accelerated("char_lm", zoo.overrides("char_lm", "cuda:1"))[False].config["trainer"]["devices"] == [
        1
    ]
    assert "zoo" in suites()


@pytest.mark.slow
def test_rows_compare_whole_fits_and_say_in_the_callbacks_words_why_a_model_stays_dense():
    assert call("bench", "zoo", "quick=true") == 0
    (folder,) = folders("bench")
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    assert [row["case"].partition(",")[0] for row in rows] == ["sae_breast_cancer", "gan_digits"]
    for row in rows:
        assert row["ratio"]["pairs"] == 2
        assert row["verdict"] == "undecided"
        assert 0 < row["seconds"]["plain"] < 60
        assert set(row["seconds"]) == {row["baseline"], row["variant"]}
        assert "dense" in row["note"]
        assert "steps remain" in row["note"]
