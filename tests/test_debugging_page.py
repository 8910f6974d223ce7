"""docs/debugging.md and docs/trace.md: the programs on them do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "debugging.md").read_text(encoding="utf-8")


def program(name: str, *arguments: str, typed: str = "") -> str:
    """What a program of the page writes, on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", name, *arguments]
    done = subprocess.run(
        command, cwd=DOCS / "debugging", input=typed, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout + done.stderr


def test_the_programs_are_those_shown() -> None:
    """Guards: a page that was not written again after its programs changed."""
    assert (DOCS / "debugging" / "norms.py").read_text(encoding="utf-8").strip() in PAGE
    for name in ("debugging", "trace"):
        page, template = ((DOCS / f"{name}{end}").read_text(encoding="utf-8") for end in (".md", ".template.md"))
        for command in re.findall(r"^<!-- (?:RUN!?|PDB|FAIL) (.+) -->$", template, re.MULTILINE):
            assert f"$ {command}\n" in page


@pytest.mark.parametrize(
    ("arguments", "typed", "shown"),
    [
        (("loop.py",), "", r"MismatchError: The ranks part at collective \d+ of ranks 0, 1"),
        (("train.py", "trace"), "", r"backward +all_reduce +self_attn\.q_norm +weight"),
        (
            ("train.py", "stop"),
            "c\nc\n",
            r"rank 0: backward all_reduce of float32 \(128,\), model\.layers\.0\..*q_norm",
        ),
    ],
)
def test_they_show_what_the_page_says(arguments: tuple[str, ...], typed: str, shown: str) -> None:
    """Guards: a tool that finds the page's bugs no more, or says something else of them."""
    written = program(*arguments, typed=typed)
    assert re.search(shown, written), written
    assert re.search(shown, PAGE)
