"""How an estimate is shown: as text that fits a terminal, and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from shardwise.debug.record import Collective
from shardwise.estimate.kinds import LayerKind
from shardwise.estimate.live import SCORES
from shardwise.estimate.picture import Scene, scene, to_svg, to_text
from shardwise.plan.notes import notes
from shardwise.plan.show import amount, sections, shape, summary, table, title
from shardwise.report import Page, Section
from shardwise.report.text import WIDTH

if TYPE_CHECKING:
    from shardwise.estimate.result import Estimate

_ATTENTION = {
    SCORES: "attention keeps the scores of all pairs of tokens",
    "flash": "attention by torch's flash kernel",
    "efficient": "attention by torch's memory-efficient kernel",
}
_PICTURES, _DRAWN = 4, 2
_COLLECTIVE = ("phase", "collective", "module", "tensor", "shape", "MiB")


def text(found: Estimate, width: int = WIDTH, colours: bool = False) -> list[RenderableType]:
    """Memory of a rank, what is left whole, what a rank sends, and the table of rules; with `colours`, pictures of layers."""
    said = [f"note  {note}" for note in notes(found.plan)]
    return [
        f"[bold]{headline(found)}[/]",
        "",
        memory(found),
        "",
        assumptions(found),
        *([""] if said else []),
        *said,
        "",
        *(part for one in scenes(found)[:_DRAWN] * colours for part in (to_text(one), "")),
        *collectives(found),
        traffic(found),
        "",
        summary(found.plan),
        "",
        table(found.plan, width),
    ]


def page(found: Estimate) -> Page:
    """The same as a page."""
    return Page(
        title=headline(found),
        verdict=f"{amount(found.peak)} on a rank at most, in {found.peak_in}. {traffic(found)}",
        sections=[
            Section("Memory of a rank", text=assumptions(found), headings=("", "", "%", ""), rows=list(_memory(found))),
            *pictures(found),
            *(
                Section(
                    f"Collectives: {kind.title}",
                    headings=(*_COLLECTIVE[:-1], "MiB a layer" if kind.layers[0] else "MiB"),
                    rows=[_cells(kind, record) for record in kind.collectives],
                )
                for kind in found.kinds
                if kind.collectives
            ),
            *sections(found.plan),
        ],
    )


def pictures(found: Estimate) -> list[Section]:
    """A drawing of each kind of layer, up to a few."""
    drawn = scenes(found)[:_PICTURES]
    return [Section(f"One of {one.title}" if "  x " in one.title else one.title, picture=to_svg(one)) for one in drawn]


def scenes(found: Estimate) -> list[Scene]:
    """What there is to draw, of each kind of layer."""
    return [one for kind in found.kinds if (one := scene(kind, found.plan)) is not None]


def headline(found: Estimate) -> str:
    """Model, ranks and step."""
    return f"{found.model}, {title(found.plan)}: {found.step}"


def assumptions(found: Estimate) -> str:
    """On what the figures rest, in a sentence or two."""
    attention = [words for name, words in _ATTENTION.items() if any(name in kernel for kernel in found.attention)]
    dtypes = ", ".join(sorted({str(row.dtype).removeprefix("torch.") for row in found.plan if not row.buffer}))
    return (
        f"Weights in {dtypes}; {''.join(f'{words}; ' for words in attention)}sequences without padding. Simulated as the first "
        "rank: what an allocator rounds up, and buffers of kernels and of the communication library, come on top."
    )


def memory(found: Estimate) -> Table:
    """A row for each kind of memory."""
    shown = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for justify in ("left", "right", "right", "left"):
        shown.add_column(justify=justify)
    for row in _memory(found):
        style = "bold" if row[0] == "peak" else ""
        shown.add_row(*row, style=style)
    return shown


def _memory(found: Estimate) -> Iterator[tuple[str, str, str, str]]:
    if found.step.training:
        rows = [
            ("parameters", found.parameters, "with buffers"),
            ("gradients", found.gradients, "all of them, after backward"),
            ("optimizer", found.optimizer, found.step.optimizer),
            ("activations", found.activations, "kept for backward, and in work, at their peak"),
        ]
    else:
        rows = [
            ("parameters", found.parameters, "with buffers"),
            ("KV cache", found.cache, "after the prefill"),
            ("activations", found.activations, "in the prefill, at their peak"),
        ]
    for name, size, note in [*rows, ("peak", found.peak, f"in {found.peak_in}")]:
        yield name, amount(size), f"{size / max(found.peak, 1):.1%}", note


def collectives(found: Estimate) -> list[RenderableType]:
    """A table for each kind of layer."""
    shown: list[RenderableType] = []
    for kind in found.kinds:
        if not kind.collectives:
            continue
        name = f"collectives of {kind.title}" if kind.layers[0] else f"collectives {kind.title}"
        grid = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for heading in _COLLECTIVE:
            grid.add_column(heading, justify="right" if heading == "MiB" else "left", overflow="fold")
        for record in kind.collectives:
            grid.add_row(*_cells(kind, record))
        shown += [grid, ""]
    return shown


def _cells(kind: LayerKind, record: Collective) -> list[str]:
    module = kind.inside(record.module) or "-"
    return [
        record.phase,
        record.op,
        module,
        record.tensor,
        f"{record.dtype} {shape(record.shape)}",
        f"{record.bytes / 2**20:,.2f}",
    ]


def traffic(found: Estimate) -> str:
    """What a step sends in all."""
    if not found.collectives:
        return "No collectives."
    step = "step" if found.step.training else "prefill"
    return (
        f"{len(found.collectives):,} collectives a {step}: a rank puts in {amount(found.put_in)}, and sends "
        f"{amount(found.sent)} if rings do it."
    )
