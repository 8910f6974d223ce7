"""A verification to read: in the terminal, and as a page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shardwise.report import Page, Section, as_text

if TYPE_CHECKING:
    from shardwise.verify.result import Check, Culprit, Verification

WIDTH = 100


def report(result: Verification) -> str:
    """The report as text of a fixed width, without colours."""
    return as_text(renderable(result), width=WIDTH)


def renderable(result: Verification) -> RenderableType:
    """The report for a console: checks, verdict, and where something differs, the culprit."""
    facts = Table.grid(padding=(0, 2))
    for name, value in result.facts:
        facts.add_row(Text(name, "dim"), Text(value))
    parts: list[RenderableType] = [Text.assemble(("shardwise verify  ", "bold"), result.title), facts, "", _checks(result), ""]
    parts.append(_verdict(result))
    parts += [Text(note, "dim") for note in result.notes]
    if result.culprit is not None:
        parts += ["", _culprit(result.culprit)]
    return Group(*parts)


def page(result: Verification) -> Page:
    """The report as a page that stands alone."""
    sections = []
    if (culprit := result.culprit) is not None:
        sections.append(_culprit_section(culprit))
        if culprit.hypotheses:
            sections.append(_hypotheses_section(culprit))
    rows = [(_mark(c), c.name, number(c.measured), _bound(c), c.unit, c.place) for c in result.checks]
    reasons: dict[str, list[str]] = {}
    for check in result.checks:
        reasons.setdefault(check.reason, []).append(check.name.partition(",")[0])
    why = "\n".join(f"{', '.join(dict.fromkeys(names))}: {reason}." for reason, names in reasons.items())
    sections.append(Section("Checks", why, ("", "check", "measured", "at most", "", "where"), rows))
    sections.append(Section("What was verified", "", ("", ""), result.facts))
    if result.notes:
        sections.append(Section("To know", "\n".join(result.notes)))
    return Page(f"shardwise verify: {result.title}", _verdict(result).plain, result.passed, sections)


def number(value: float | None) -> str:
    """A measured number, as short as it can be."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "not a number"
    if value == 0 or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:g}"
    return f"{value:.2f}" if 0.1 <= abs(value) < 1000 else f"{value:.1e}"


def _checks(result: Verification) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    table.add_column("", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("at most", justify="right", no_wrap=True)
    table.add_column("", overflow="fold", style="dim")
    for check in result.checks:
        said = check.reason if check.measured is None else check.place if not check.passed else check.unit
        mark = Text(_mark(check), "bold red" if not check.passed else "yellow" if check.measured is None else "green")
        table.add_row(mark, check.name, number(check.measured), _bound(check), said)
    return table


def _verdict(result: Verification) -> Text:
    failed = len(result.failed)
    count = failed + sum(check.passed and check.measured is not None for check in result.checks)
    took = f", {result.seconds:.0f} s" if result.seconds else ""
    if not failed:
        return Text.assemble(
            (f"All {count} checks hold", "bold green"), f"{took}: the ranks compute what one process computes."
        )
    return Text.assemble((f"{failed} of {count} checks fail", "bold red"), f"{took}.")


def _culprit(culprit: Culprit) -> RenderableType:
    fitting = culprit.explanation
    headline = Text.assemble(
        ("first to differ  ", "dim"), (culprit.module or "(the model itself)", "bold red"), f"  {culprit.what}"
    )
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(culprit):
        facts.add_row(Text(name, "dim"), Text(value))
    parts: list[RenderableType] = [headline, facts]
    if culprit.hypotheses:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("")
        table.add_column("if it were")
        table.add_column("error left", justify="right", no_wrap=True)
        table.add_column("that is", overflow="fold", style="dim")
        for one in culprit.hypotheses:
            style = "bold green" if one is fitting else "green" if one.fits else ""
            table.add_row(
                Text("→" if one is fitting else "✓" if one.fits else "", style),
                Text(one.name, style),
                Text(number(one.remaining), style),
                one.means,
            )
        parts += ["", table]
    if culprit.hypotheses:
        parts += ["", Text(conclusion(culprit), "bold")]
    if culprit.note:
        parts.append(Text(culprit.note))
    if culprit.way_on:
        parts += ["", *(Text(line, "cyan") for line in culprit.way_on)]
    return Group(*parts)


def conclusion(culprit: Culprit) -> str:
    """Which hypothesis fits, in a sentence."""
    fitting = culprit.explanation
    return f"It is {fitting.name}." if fitting else "None of these explains the numbers."


def _facts(culprit: Culprit) -> list[tuple[str, str]]:
    found = [("in", culprit.phase), ("style", culprit.style)]
    if culprit.shape:
        found.append(("shape", " x ".join(map(str, culprit.shape))))
    if culprit.error is not None:
        wrong = number(culprit.error) if math.isfinite(culprit.error) else "another shape, or not a number"
        found.append(("error", f"{wrong}, at most {number(culprit.bound)}"))
    return [*found, *culprit.numbers]


def _culprit_section(culprit: Culprit) -> Section:
    fitting = culprit.explanation
    words = f"{conclusion(culprit)} {fitting.means[0].upper()}{fitting.means[1:]}." if fitting else conclusion(culprit)
    text = "\n".join(filter(None, (words, culprit.note, *culprit.way_on)))
    return Section(f"First to differ: {culprit.module or 'the model itself'}, {culprit.what}", text, ("", ""), _facts(culprit))


def _hypotheses_section(culprit: Culprit) -> Section:
    rows = [("fits" if h.fits else "", h.name, number(h.remaining), h.means) for h in culprit.hypotheses]
    return Section("What would explain it", "", ("", "if it were", "error left", "that is"), rows)


def _mark(check: Check) -> str:
    return "✗" if not check.passed else "–" if check.measured is None else "✓"


def _bound(check: Check) -> str:
    return "" if check.measured is None else number(check.bound)
