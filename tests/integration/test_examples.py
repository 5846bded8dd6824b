"""Every example is short, runs as it is and says what came out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def test_there_is_an_example_for_every_accelerator():
    names = {path.stem for path in EXAMPLES}
    needed = {
        "rank_quantization",
        "sequential_freezing",
        "l1inf_projection",
        "intra_stream_scheduling",
        "async_sgd",
        "fabric_loop",
        "plain_loop",
    }
    assert needed <= names, f"missing: {sorted(needed - names)}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_has_at_most_sixty_lines(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path):
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.strip(), "an example prints what it found"


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_is_kept_without_outputs(notebook, capsys):
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names = {"__name__": "__main__"}
    said = []
    for number, cell in enumerate(cells, 1):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        exec(compile("".join(cell["source"]), f"{notebook.name}, code cell {number}", "exec"), names)
        said.append(capsys.readouterr().out)
    assert "accuracy" in "".join(said)
