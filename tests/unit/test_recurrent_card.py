"""The method card's tables of what runs plainly quote messages that the code says."""

import ast
import re
from pathlib import Path

import pytest

import lightning_accel
from lightning_accel import recurrent

PACKAGE = Path(lightning_accel.__file__).parent
CARD = (Path(recurrent.__file__).parent / "README.md").read_text(encoding="utf-8")
SOURCES = [
    *(PACKAGE / "recurrent").rglob("*.py"),
    *(PACKAGE / "callbacks" / "recurrent").rglob("*.py"),
    PACKAGE / "torch_private.py",
]
# What the code puts together of parts.
COMPOSED = {
    "a transform of torch.func is active": ("a transform of torch.func", " is active"),
    "has forward hooks": (" has ", "_forward_hooks"),
    "plainly: the gradient of": (" plainly: ", "the gradient of"),
    "it has forward pre hooks": (" has ", "_forward_pre_hooks"),
}


def said():
    """Every piece of text in the code; parts of a message between two values are pieces of their own."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def quoted():
    """The pieces of each message that a table quotes, without what stands for a value (`...`, N, a name, a number)."""
    tables = re.findall(r"^\| (?:what runs|a whole step|what runs plain).*?(?=\n\n)", CARD, re.M | re.S)
    for row in "\n".join(tables).splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        for code in re.findall(r"```? ?(.+?) ?```?|`([^`]+)`", cells[-1]):
            for piece in re.split(r"\.\.\.|\bN\b|`[^`]*`|'[a-z_]+'|\d+|: it is given.*", "".join(code)):
                words = piece.strip(" .:,")
                if len(words) > 8:
                    yield words


SAID = "\n".join(said())


def test_the_tables_are_found():
    assert len(list(quoted())) > 20


@pytest.mark.parametrize("words", sorted(set(quoted())))
def test_what_a_table_quotes_is_said(words):
    assert all(part in SAID for part in COMPOSED.get(words, (words,)))
