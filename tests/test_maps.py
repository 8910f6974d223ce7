"""The maps that a reader finds his way by: what a folder's `__init__.py` and the README say is where."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import shardwise

SOURCES = Path(shardwise.__file__).parent
FOLDERS = [path.parent for path in sorted(SOURCES.rglob("__init__.py")) if "|---|" in path.read_text(encoding="utf-8")]
README = Path(__file__).parents[1] / "README.md"


def places(folder: Path, text: str) -> tuple[set[str], set[str]]:
    """The files of `folder` that the table in `text` does not name, and the names in it of which there is none."""
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    there = {path.stem if path.is_file() else f"{path.name}/" for path in folder.iterdir() if path.name[0] not in "_."}
    named = set(re.findall(r"`([a-z_]+/?)`", " ".join(cell for row in rows for cell in row)))
    firsts = set(re.findall(r"`([a-z_]+/?)`", " ".join(row[1] for row in rows)))
    return {name for name in there - named if not name.endswith("/")}, firsts - there


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_file_is_in_its_folders_table(folder):
    """Guards: a file that was moved, added or taken away, and a table that sends readers elsewhere."""
    text = (folder / "__init__.py").read_text(encoding="utf-8").split('"""')[1]
    assert places(folder, text) == (set(), set())
    assert places(folder, text.replace("| `", "| `no_", 1))[1]  # one that is not there is seen


def test_what_the_readme_links_to_is_there():
    """Guards: links that lead nowhere, after a move."""
    links = re.findall(r"\]\(([^)#]+)", README.read_text(encoding="utf-8"))
    assert len(links) > 50
    assert [link for link in links if not link.startswith("http") and not (README.parent / link).exists()] == []
