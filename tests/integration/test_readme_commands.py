"""Every command line of the README and of the method cards runs; long ones are shortened by overrides at their end."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_command_line_of_a_page_runs(line, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(with_overrides(line), cwd=tmp_path, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
