"""A result as a page that stands alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from shardwise.profiling import plots, tables
from shardwise.profiling.tables import Table
from shardwise.report import Page, Section

if TYPE_CHECKING:
    from shardwise.profiling.result import Comparison, Profile

_MODULES, _OPERATORS, _COLLECTIVES, _LATE = 20, 15, 20, 10


def make_page(result: Comparison) -> Page:
    """All cells beside each other, and then each by itself."""
    sections = [
        _section(tables.steps(result), plots.step_bars(result)),
        _section(tables.breakdowns(result), plots.breakdown_bars(result)),
    ]
    for one in result.profiles:
        sections += _details(one)
    return Page(f"shardwise profile: {result.title}", verdict(result), None, [*sections, _about(result)])


def verdict(result: Comparison) -> str:
    """What came out, in a sentence or two."""
    ours = result.profiles[0]
    ranks = ours.analysis.ranks
    exposed = sum(rank.exposed for rank in ranks) / sum(rank.step for rank in ranks)
    host = sum(rank.host for rank in ranks) / sum(rank.step for rank in ranks)
    times = [f"{one.cell} {tables.ms(one.step * 1e6)} ms" for one in result.profiles]
    return (
        f"A step: {', '.join(times)}. In that of {ours.cell}, exposed communication takes {exposed:.0%} and the host "
        f"{host:.0%} of the profiled time."
    ).replace("%", " %")


def _details(profile: Profile) -> Iterator[Section]:
    first = _section(tables.ranks(profile), plots.timeline(profile))
    yield Section(f"{profile.cell}: the ranks", first.text, first.headings, first.rows, first.picture)
    for table, picture in (
        (tables.layers(profile, together=False), plots.layer_bars(profile)),
        (tables.modules(profile, _MODULES), ""),
        (tables.collectives(profile, _COLLECTIVES), ""),
        (tables.late(profile, _LATE), ""),
        (tables.operators(profile, _OPERATORS), ""),
    ):
        section = _section(table, picture)
        title = f"{profile.cell}: {table.title[0].lower()}{table.title[1:]}"
        yield Section(title, section.text, section.headings, section.rows, section.picture)


def _about(result: Comparison) -> Section:
    traces = ", ".join(f"{one.cell.key}.trace.json.gz" for one in result.profiles)
    lines = [
        f"Measured on {result.how}.",
        *(f"{line}." for line in tables.contenders(result)),
        "",
        f"Beside this page lie {traces}: all ranks on one clock, to be opened at ui.perfetto.dev (File, Open; nothing is sent "
        "anywhere). Each rank is a process, its first row its collectives, with arrows from the rank that came last. "
        "In ranks/ are the traces as torch wrote them, a file each rank; report.json has every figure.",
    ]
    return Section("How it was measured", "\n".join(lines))


def _section(table: Table, picture: str) -> Section:
    return Section(table.title, table.text, table.headings, table.rows, picture)
