"""A verification to read: in the terminal, and as a page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shardwise.report import Page, Section, as_text
from shardwise.verify.proven import wrong_plan

if TYPE_CHECKING:
    from shardwise.infer import Island, Proof
    from shardwise.verify.result import Check, Culprit, Verification

WIDTH = 100


def report(result: Verification) -> str:
    """The report as text of a fixed width, without colours."""
    return as_text(renderable(result), width=WIDTH)


def renderable(result: Verification) -> RenderableType:
    """The report for a console: what is known before ranks start, and what they found."""
    return Group(heading(result), "", findings(result))


def heading(result: Verification) -> RenderableType:
    """What was verified, and the proof of the plan."""
    facts = Table.grid(padding=(0, 2))
    for name, value in result.facts:
        facts.add_row(Text(name, "dim"), Text(value))
    parts: list[RenderableType] = [Text.assemble(("shardwise verify  ", "bold"), result.title), facts]
    return Group(*parts, *(() if result.proof is None else ("", _islands(result.proof), _proven(result.proof))))


def findings(result: Verification) -> RenderableType:
    """What the ranks found: checks, verdict, and where something differs, the culprit."""
    parts: list[RenderableType] = [_checks(result), "", _verdict(result)]
    if result.blame:
        parts.append(Text(result.blame, "bold"))
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
    if result.proof is not None:
        sections.append(_proof_section(result.proof))
    sections.append(Section("Checks", why, ("", "check", "measured", "at most", "", "where"), rows))
    sections.append(Section("What was verified", "", ("", ""), result.facts))
    if result.notes:
        sections.append(Section("To know", "\n".join(result.notes)))
    verdict = " ".join(filter(None, (_verdict(result).plain, result.blame)))
    return Page(f"shardwise verify: {result.title}", verdict, result.passed, sections)


def number(value: float | None) -> str:
    """A measured number, as short as it can be."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "not a number"
    if value == 0 or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:g}"
    return f"{value:.2f}" if 0.1 <= abs(value) < 1000 else f"{value:.1e}"


def _islands(proof: Proof) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    table.add_column("island", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("gradients", justify="right", no_wrap=True)
    table.add_column("styles", overflow="fold", style="dim")
    for island in proof.islands:
        mark = Text("✓", "green") if island.problem is None else Text("✗", "bold red")
        table.add_row(mark, *_cells(island), island.styles)
    return table


def _cells(island: Island) -> tuple[str, str, str]:
    """Its name, how many layers have it, and the largest error of a gradient."""
    error = number(island.gradients) if math.isfinite(island.gradients) else "-"
    return island.name, f"x {island.count}" if island.count > 1 else "", error


def _proven(proof: Proof) -> Text:
    if proof:
        return Text.assemble(("The plan is proven in one process", "bold green"), f": {_errors(proof)}. Tried: {proof.tried}.")
    others = [f"\n{i.name}: {i.problem}." for i in proof.islands if i.problem not in (None, proof.problem)]
    said = wrong_plan(proof).removeprefix("The plan is wrong")
    return Text.assemble(("The plan is wrong", "bold red"), said, *others)


def _errors(proof: Proof) -> str:
    return f"outputs within {number(proof.outputs)}, gradients within {number(proof.gradients)}"


def _proof_section(proof: Proof) -> Section:
    what = f"Every rank simulated in one process, forward and backward, before ranks were started: {proof.tried}."
    rows = [("✓" if i.problem is None else "✗", *_cells(i), i.worst, i.styles) for i in proof.islands]
    headings = ("", "island", "layers", "gradients", "the largest of", "styles")
    return Section("The proof of the plan", f"{what}\n{_proven(proof).plain}", headings, rows)


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
    if not failed and not result.passed:
        return Text.assemble(("The plan is wrong", "bold red"), f", though all {count} checks hold{took}.")
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
