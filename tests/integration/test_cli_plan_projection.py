"""``plan`` of the projection callbacks."""

import re

import pytest
from cli_calls import call

SAE = ["model=sae", "model.hidden_size=20", "data=classification"]


def table(out):
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    return {name: (shape, int(groups), norm, radius, zero) for name, shape, groups, norm, radius, zero in rows}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("l1inf_projection", []),
        ("l1inf_projection", ["method=exact"]),
        ("multilevel_projection", ["norms=[l1,l2]"]),
    ],
)
def test_plan_shows_what_a_target_sparsity_clears(name, more, capsys):
    settings = [f"callbacks.{name}.{word}" for word in ["target_sparsity=0.9", "parameters=*coder.0.weight", *more]]
    assert call("plan", *SAE, f"callbacks=[{name}]", *settings) == 0
    out = capsys.readouterr().out
    rows = table(out)
    assert set(rows) == {"encoder.0.weight", "decoder.0.weight", "all"}
    shape, groups, norm, radius, zero = rows["encoder.0.weight"]
    assert (shape, groups, zero) == ("20x1000", 20, "18 (90.0%)")
    assert 0 < float(radius) < float(norm)
    assert rows["all"][1] == 40
    assert rows["all"][4] == "36 (90.0%)"
    (milliseconds,) = re.findall(r"One projection of all takes ([\d.]+) ms here, after every optimizer step", out)
    assert float(milliseconds) > 0


def test_plan_shows_a_shared_radius_and_what_it_leaves_nothing_of(capsys):
    settings = ["radius=0.0", "scope=global", "every_n_epochs=2", "min_groups=0", "parameters='*weight'"]
    assert (
        call("plan", *SAE, "callbacks=[l1inf_projection]", *(f"callbacks.l1inf_projection.{w}" for w in settings)) == 0
    )
    out = capsys.readouterr().out
    rows = table(out)
    assert [row[3] for row in rows.values()] == ["shared"] * 4 + ["0"]
    assert "Radius 0, one budget over all" in out
    assert "at the end of every 2nd epoch" in out
    assert "Nothing would be left of encoder.0.weight, encoder.2.weight" in out


def test_plan_says_what_a_fraction_of_the_norm_is(capsys):
    settings = ["radius_fraction=0.5", "at_end=true", "parameters='*weight'"]
    assert (
        call("plan", *SAE, "callbacks=[l1inf_projection]", *(f"callbacks.l1inf_projection.{w}" for w in settings)) == 0
    )
    out = capsys.readouterr().out
    _, _, norm, radius, _ = table(out)["decoder.2.weight"]
    assert float(radius) == pytest.approx(float(norm) / 2, rel=1e-3)
    assert "once, when training ends" in out


def test_plan_leaves_out_what_writes_the_output(capsys):
    assert call("plan", *SAE, "callbacks=[l1inf_projection]") == 0
    out = capsys.readouterr().out
    assert set(table(out)) == {"encoder.0.weight", "decoder.0.weight", "all"}
    assert table(out)["all"][4] == "20 (50.0%)"
    assert "Left alone: encoder.2.weight (writes the model's output), decoder.2.weight (writes" in out


def test_plan_says_why_nothing_would_be_projected(capsys):
    words = ["model=mlp", "data=digits", "callbacks=[l1inf_projection]", "callbacks.l1inf_projection.min_groups=2000"]
    assert call("plan", *words) == 2
    assert "nothing would be projected: hidden.0.weight only 1024 groups" in capsys.readouterr().err


def test_plan_explains_that_no_parameter_fits(capsys):
    words = ["callbacks=[multilevel_projection]", "callbacks.multilevel_projection.parameters=nowhere"]
    assert call("plan", *SAE, *words) == 2
    assert "MultilevelProjection found no parameter to project" in capsys.readouterr().err


def test_plan_shows_whole_names(capsys):
    words = ["model=resnet18", "model.width=4", "data=digits", "callbacks=[l1inf_projection]"]
    assert call("plan", *words) == 0
    cells = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert "layer2.0.shortcut.0.weight" in "".join(cells)
    assert not any("…" in cell for cell in cells)
