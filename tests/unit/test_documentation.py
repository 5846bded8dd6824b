"""Links of the pages lead to files that exist, on a package index as well as in a checkout."""

import re
from importlib.metadata import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
URLS = dict(entry.split(", ", 1) for entry in metadata("lightning-accel").get_all("Project-URL") or [])
HOME = URLS["Homepage"]
RAW = HOME.replace("github.com", "raw.githubusercontent.com")
CARDS = sorted((ROOT / "lightning_accel").glob("*/README.md"))
PAGES = [
    ROOT / ".github" / "CONTRIBUTING.md",
    *sorted((ROOT / "lightning_accel").rglob("README.md")),
    *sorted((ROOT / "lightning_accel").rglob("MEASURED.md")),
]


def links(page):
    text = page.read_text()
    return [*re.findall(r"\]\(([^)\s#]+)[^)]*\)", text), *re.findall(r"^\[[\w-]+\]: (\S+)$", text, re.MULTILINE)]


def test_links_of_the_readme_are_absolute_and_lead_to_files_of_this_repository():
    own = [link for link in links(ROOT / "README.md") if link.startswith((HOME, RAW))]
    assert own
    for link in links(ROOT / "README.md"):
        assert link.startswith("https://"), f"{link} leads nowhere on a package index"
    for link in own:
        path = link.removeprefix(f"{HOME}/blob/main/").removeprefix(f"{RAW}/main/")
        assert (ROOT / path).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page):
    for link in links(page):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_contributing_names_files_that_exist():
    named = re.findall(
        r"`((?:lightning_accel|tests|conf)/[\w/.]*)`", (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    )
    assert len(named) >= 6
    for path in named:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_cards_begin_with_a_status_and_keep_their_full_tables_beside_them(card):
    text = card.read_text()
    status = text.split("\n## ")[0].split("> **Status.** ")[1].split("\n\n")[0]
    assert "*stable*" in status.lower() or "*experimental*" in status.lower()
    assert "Measured on" in status or "Measured with" in status
    measured = text.split("\n## Measured\n")[1].split("\n## ")[0]
    assert "(MEASURED.md)" in measured
    rows = measured.split("| ratio [interval] |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert 5 <= len(rows) <= 12
    full = (card.parent / "MEASURED.md").read_text()
    for row in rows:  # as they are in the full table, with fewer columns
        case, what, *_, ratio = (cell.strip() for cell in row.strip("|").split("|"))
        assert any(all(cell in line for cell in (case, what, ratio)) for line in full.splitlines()), row
