"""A result on the screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from shardwise.profiling import tables
from shardwise.profiling.tables import Table

if TYPE_CHECKING:
    from shardwise.profiling.result import Comparison, Profile

_LAYERS, _OPERATORS, _COLLECTIVES, _LATE = 12, 8, 8, 3


def parts(result: Comparison) -> Iterator[RenderableType]:
    """The tables for the terminal: all cells beside each other, and the details of the first."""
    yield Text(f"shardwise profile  {result.title}", style="bold")
    yield Text("\n".join([result.how, *tables.contenders(result)]), style="dim")
    first = result.profiles[0]
    yield from _table(tables.steps(result))
    yield from _table(tables.breakdowns(result))
    several = len(result.profiles) > 1
    yield Text(f"\n{first.cell}, the profiled step" + (" (the others are on the page)" if several else ""), style="bold")
    yield from details(first)


def details(profile: Profile) -> Iterator[RenderableType]:
    """The tables of one cell."""
    for table in (
        tables.ranks(profile),
        tables.layers(profile, together=True),
        tables.collectives(profile, _COLLECTIVES),
        tables.late(profile, _LATE),
        tables.operators(profile, _OPERATORS),
    ):
        yield from _table(table)


def _table(table: Table) -> Iterator[RenderableType]:
    drawn = RichTable(title=f"\n{table.title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, heading in enumerate(table.headings):
        text = number == 0 or heading in ("phase", "came last")
        # Names are folded where the screen is narrow, down to what can still be read.
        least = min(24, max((len(cells[number]) for cells in table.rows), default=0)) if text else None
        drawn.add_column(heading, justify="left" if text else "right", header_style="dim", min_width=least, overflow="fold")
    for cells in table.rows:
        drawn.add_row(*cells)
    yield drawn
    if table.text:
        yield Text(table.text, style="dim")
