"""Every command line of the README and of the method cards runs and measures what it says it does.

Long ones are shortened by overrides at their end; one that is quick is run as it stands.
"""

import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "lightning_accel").glob("*/README.md"))]
INSTALL = "python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 -e"
FRESH_MACHINE = (
    f'{INSTALL} ".[examples]" && .venv/bin/lightning-accel compare',
    f'{INSTALL} ".[test]" && .venv/bin/pytest',
)
SHORT_FIT = [
    "trainer.max_epochs=1",
    "++trainer.limit_train_batches=2",
    "++trainer.limit_val_batches=2",
    "++trainer.limit_test_batches=2",
]
SHORTENED = {
    "train": SHORT_FIT,
    "compare": [*SHORT_FIT, "compare.pairs=2"],
    "bench": ["quick=true"],
    "plan": [],
    "export": [],
    "run": [],
}


def command_lines(page: Path) -> list[str]:
    """Return the lines of the page's ``bash`` blocks, continuation lines joined, comments dropped."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        " ".join(re.split(r"\s+# ", line)[0].split()) for line in lines if line.strip() and not line.startswith("#")
    ]


PROJECTION = (
    "lightning-accel train experiment=sae_breast_cancer callbacks=[l1inf_projection] "
    "callbacks.l1inf_projection.target_sparsity=0.9 optimized_metric=null"
)
COMMANDS = sorted({line for page in PAGES for line in command_lines(page)} - set(FRESH_MACHINE))


SHORT_SELECTION = [  # a study of feature selection times ten single steps, and trains before and after its masks
    "trainer.max_epochs=2",
    "++trainer.limit_train_batches=8",
    "++trainer.limit_val_batches=2",
    "selection.retrain_epoch=1",
    "compare.pairs=2",
]


def with_overrides(line: str) -> list[str]:
    program, *words = shlex.split(line)
    if program == "python":
        return [sys.executable, *words]
    assert program == "lightning-accel", f"a README line starts with an unknown program: {line}"
    command = [str(Path(sys.executable).with_name("lightning-accel")), *words]
    extra = SHORTENED.get(words[0], []) if words else []
    if words[:1] == ["compare"] and any("experiment=sae_" in word for word in words):
        extra = SHORT_SELECTION
    cut = command.index("--") if "--" in command else len(command)
    given = {word.lstrip("+").split("=")[0] for word in command}
    return [*command[:cut], *(e for e in extra if e.lstrip("+").split("=")[0] not in given), *command[cut:]]


def test_the_two_commands_for_a_fresh_machine_are_in_the_readme():
    lines = command_lines(ROOT / "README.md")
    assert [line for line in lines if line in FRESH_MACHINE] == list(FRESH_MACHINE)


def test_every_method_card_shows_a_command():
    for page in PAGES:
        assert command_lines(page), f"{page.name} of {page.parent.name} has no command line"


def run_line(command, folder):
    (folder / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def written(folder, name):
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob(name))]


def check_train(folder, line):
    runs = written(folder, "metrics.json")
    assert len(runs) == (2 if " -m " in line else 1), "one record a run"
    for run in runs:
        assert run["metrics"], run
        assert all(value is not None and math.isfinite(value) for value in run["metrics"].values()), run
        scores = [value for name, value in run["metrics"].items() if name.endswith(("accuracy", "loss"))]
        assert scores
        assert all(0.0 <= value < 10.0 for value in scores), run
        assert all(v <= 1.0 for name, v in run["metrics"].items() if name.endswith("accuracy")), run


def check_compare(folder, line):
    if "experiment=sae_" in line:
        (runs,) = written(folder, "feature_selection.json")
        assert {run["method"] for run in runs} >= {"no projection", "bi-level", "exact", "magnitude", "random"}
        assert all(0.0 <= run["accuracy"] <= 1.0 and run["features"] > 0 for run in runs)
        return
    (summary,) = written(folder, "comparison.json")
    numbers = re.findall(r"-?[0-9]+\.[0-9]+", json.dumps(summary))
    assert len(numbers) > 10, "times, accuracies and their intervals"


def check_bench(folder, _):
    (bench,) = written(folder, "bench.json")
    assert bench["rows"]
    for row in bench["rows"]:
        assert all(seconds is None or seconds > 0.0 for seconds in row.get("seconds", {}).values()), row


def check_plan(_, line, out):
    assert re.search(r"[0-9]+(\.[0-9]+)? ?(ms|µs|us|s\b|%|times)", out), (
        f"{line} shows no number with a unit:\n{out[-2000:]}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COMMANDS if line != PROJECTION])
def test_command_line_of_a_page_runs_and_measures(line, tmp_path):
    out = run_line(with_overrides(line), tmp_path)
    _, command, *_ = shlex.split(line)
    checks = {"train": check_train, "compare": check_compare, "bench": check_bench}
    if command in checks:
        checks[command](tmp_path, line)
    elif command == "plan":
        check_plan(tmp_path, line, out)
    else:
        assert "lightning-accel" in out


@pytest.mark.slow
def test_the_recipe_of_projection_ends_near_the_accuracy_without_it(tmp_path):
    assert PROJECTION in COMMANDS
    program, *words = shlex.split(PROJECTION)
    plain = [word for word in words if "callbacks" not in word]
    found = {}
    for name, (command, *overrides) in (("plain", plain), ("projected", words)):
        (tmp_path / name).mkdir()
        line = [str(Path(sys.executable).with_name(program)), command, "-m", *overrides, "seed=1,2,3"]
        run_line(line, tmp_path / name)
        found[name] = [record["metrics"] for record in written(tmp_path / name, "metrics.json")]
        assert len(found[name]) == 3
        assert all(metrics["val/accuracy"] > 0.9 for metrics in found[name])  # of 57 samples, each 1.8 points
    # of 113 samples, each 0.9 points: one seed is chance
    plain_accuracy, accuracy = (
        statistics.fmean(metrics["test/accuracy"] for metrics in found[name]) for name in ("plain", "projected")
    )
    assert accuracy >= plain_accuracy - 0.02, found
    assert all(m["l1inf_projection/zero_groups"] == pytest.approx(0.9, abs=0.01) for m in found["projected"])
    tested = list((tmp_path / "projected").rglob("epoch=*.ckpt"))
    assert len(tested) == 3
    for path in tested:
        rows = torch.load(path, weights_only=False)["state_dict"]["encoder.0.weight"]
        assert (rows == 0).all(1).float().mean() == pytest.approx(0.9, abs=0.01)
