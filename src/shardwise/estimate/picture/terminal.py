"""The picture in a terminal: smaller, in colours of its own, two points to a character."""

from __future__ import annotations

from rich.align import Align
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shardwise.debug.record import Collective
from shardwise.estimate.picture.lines import WHOLE, colour
from shardwise.estimate.picture.matrix import Matrix
from shardwise.estimate.picture.scene import Box, Scene
from shardwise.plan.show import amount, shape

_COLUMNS, _LINES = 26, 4
_ASPECT = 2.1  # of a character: its height in widths


def to_text(picture: Scene) -> RenderableType:
    """Rows from the layer's input down, in at most 100 columns for the usual layers."""
    matrices = [one for box in picture.boxes for one in box.matrices]
    scale = _COLUMNS / max((max(one.columns, one.rows) for one in matrices), default=1)
    parts: list[RenderableType] = [Text(f"one of {picture.title}", style="bold")]
    for row in picture.rows:
        line = Table.grid(padding=(0, 2))
        for _ in row:
            line.add_column(justify="center", vertical="bottom")
        line.add_row(*(_box(box, scale) for box in row))
        parts.append(Align.center(line, width=100))
    return Group(*parts, _legend(picture))


def _box(box: Box, scale: float) -> RenderableType:
    if box.kind == "collective":
        return Group(*(Text(_said(record), style=_style(record), justify="center") for record in box.collectives))
    if box.kind == "sum":
        return Text("(+)", style="bold")
    if box.kind == "mix":
        return Text(f"( {box.title} )", style="bold")
    matrices = [one for one in box.matrices if one.rows > 1]
    if not matrices:
        return Text(f"{box.title} {shape(box.matrices[0].shape)}", style="dim")
    line = Table.grid(padding=(0, 1))
    line.add_row(*(_blocks(one, scale) for one in matrices))
    words = [Text(shape(one.shape), style="dim", justify="center") for one in matrices]
    return Group(Text(box.title, justify="center"), Align.center(line), *words)


def _said(record: Collective) -> str:
    arrow = {"forward": "▼", "backward": "▲", "recompute": "▼ again"}[record.phase]
    return f" {arrow} {record.op.replace('_', '-')} {amount(record.bytes)} "


def _style(record: Collective) -> str:
    return "italic" if record.phase == "backward" else "bold reverse"


def _blocks(one: Matrix, scale: float) -> Text:
    """The matrix as blocks: the upper half of a character in its colour, the lower half in that behind it."""
    across, down = len({part.left for part in one.parts}), len({part.top for part in one.parts})
    columns = min(_COLUMNS, max(2, one.dealt, across, round(one.columns * scale)))
    lines = min(_LINES, max(1, -(-down // 2), round(one.rows * scale / _ASPECT)))
    text = Text()
    for line in range(lines):
        for column in range(columns):
            upper, lower = (_point(one, (column + 0.5) / columns, (2 * line + half + 0.5) / (2 * lines)) for half in (0, 1))
            text.append("▀", style=f"{upper} on {lower}")
        if line < lines - 1:
            text.append("\n")
    return text


def _point(one: Matrix, x: float, y: float) -> str:
    if one.dealt:
        return _hex(int(x * one.dealt))
    for part in one.parts:
        if part.left <= x < part.left + part.width and part.top <= y < part.top + part.height:
            return _hex(part.rank)
    return WHOLE


def _hex(rank: int | None) -> str:
    found = colour(rank)
    return found if found.startswith("#") else f"color({16 + (rank or 0) * 37 % 216})"


def _legend(picture: Scene) -> Text:
    text = Text()
    for rank in range(min(picture.ranks, 8)):
        text.append("█", style=_hex(rank)).append(f" {'rank ' if rank == 0 else ''}{rank}  ")
    text.append("█", style=WHOLE).append(" whole on every rank  ▼ in forward  ▲ in backward")
    return text
