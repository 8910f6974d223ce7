"""What rich draws, as plain text."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

WIDTH = 128


def as_text(*parts: RenderableType, width: int = WIDTH) -> str:
    """`parts` under each other, in at most `width` columns, without colours and without spaces at the ends of lines."""
    file = io.StringIO()
    console = Console(file=file, width=width)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
