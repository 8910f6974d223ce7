"""How a table is shown: as text that fits a terminal, and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from rich.console import JustifyMethod, RenderableType
from rich.table import Table

from shardwise.plan.notes import notes
from shardwise.report import Page, Section
from shardwise.report.text import WIDTH
from shardwise.spec import Source

if TYPE_CHECKING:
    from shardwise.plan.table import Plan

_HEADINGS = ("style", "from", "full shape", "on rank 0", "MiB a rank", "cut")
_TO_THE_RIGHT = ("full shape", "on rank 0", "MiB a rank")
_FROM: Mapping[Source, str] = MappingProxyType(
    {"model": "model", "user": "user", "shardwise": "ours", "inferred": "inferred", "frozen": "frozen"}
)
_WIDE = 112
"""Columns of a terminal from which on the table says how each tensor is cut, too."""


def text(plan: Plan, width: int = WIDTH) -> list[RenderableType]:
    """Title, how much a rank holds, what is left whole, and the table."""
    said = [f"note  {note}" for note in notes(plan)]
    return [title(plan), "", summary(plan), *said, "", table(plan, width), *_kept(plan)]


def _kept(plan: Plan) -> list[RenderableType]:
    frozen = any(rule.source == "frozen" for rule in plan.rules.values())
    return ["", "frozen: inferred and proven for this type"] if frozen else []


def page(plan: Plan) -> Page:
    """The same as a page."""
    return Page(title=title(plan), verdict=summary(plan), sections=sections(plan))


def title(plan: Plan) -> str:
    """How many ranks there are."""
    experts = f", experts over {plan.ep_size}" if plan.ep_size != plan.size else ""
    return f"tensor parallel over {plan.size} rank{'s' if plan.size > 1 else ''}{experts}"


def summary(plan: Plan) -> str:
    """How much the fullest rank holds."""
    share = f"{plan.share:.3f} x 1/{plan.size}"
    return f"{amount(plan.fullest_bytes)} on the fullest rank, of {amount(plan.full_bytes)}: {share}"


def table(plan: Plan, width: int = WIDTH) -> Table:
    """A row for each family of tensors, below the layers that they are in. ".weight" is left out."""
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    headings = _HEADINGS if width >= _WIDE else _HEADINGS[:-1]
    for heading in ("parameter", *headings):
        side: JustifyMethod = "right" if heading in _TO_THE_RIGHT else "left"
        shown.add_column(heading, justify=side, no_wrap=heading not in ("style", "cut"), overflow="fold")
    for above, rows in _groups(plan).items():
        if above:
            shown.add_row(f"[bold]{above}[/]")
        for name, cells in rows:
            shown.add_row(f"  {name}" if above else name, *cells[: len(headings)])
    return shown


def sections(plan: Plan) -> list[Section]:
    """What is left whole, and the table, as parts of a page."""
    said = notes(plan)
    left = [Section("Left whole", text="\n".join(said))] if said else []
    tables = [
        Section(
            above or "Outside of the layers",
            headings=("parameter", *_HEADINGS),
            rows=[[name, *("" if cell == "-" else cell for cell in cells)] for name, cells in rows],
        )
        for above, rows in _groups(plan).items()
    ]
    return [*left, *tables]


def _groups(plan: Plan) -> dict[str, list[tuple[str, list[str]]]]:
    """Rows by the layers that they are in, with how many there are; those in none under ""."""
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for name, rows in plan.families.items():
        layers, _, inside = name.rpartition(".*.")
        above = f"{layers}.*  x {len(rows)}" if layers else f"{name}  x {len(rows)}" if len(rows) > 1 else ""
        row = rows[0]
        cells = [
            row.rule.style if row.rule else "-",
            _FROM[row.rule.source] if row.rule else "-",
            shape(row.shape),
            shape(plan.local_shape(row, 0)),
            f"{sum(r.local_bytes(*plan.place(r, 0)) for r in rows) / 2**20:,.2f}",
            f"{row.layout}{', gradient summed' if row.partial else ''}",
        ]
        groups.setdefault(above, []).append((inside.removesuffix(".weight"), cells))
    return {above: groups[above] for above in sorted(groups, key=lambda above: above == "")}


def shape(lengths: tuple[int, ...]) -> str:
    """As "4096 x 1024"."""
    return " x ".join(map(str, lengths)) if lengths else "scalar"


def amount(size: int) -> str:
    """Bytes as MiB, or as GiB where that are more than 10."""
    return f"{size / 2**30:,.2f} GiB" if size > 10 * 2**30 else f"{size / 2**20:,.2f} MiB"
