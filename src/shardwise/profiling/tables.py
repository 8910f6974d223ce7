"""The tables of a result: headings and cells, for the terminal and for the page alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from shardwise.plan import wildcard
from shardwise.profiling.contenders import what_it_is
from shardwise.profiling.parts import Part
from shardwise.profiling.settings import OURS

if TYPE_CHECKING:
    from shardwise.profiling.result import Comparison, Profile

OUTSIDE = "outside of the layers"


@dataclass(frozen=True)
class Table:
    """A heading, what it means, and the cells as text; numbers in milliseconds where nothing else is said."""

    title: str
    text: str
    headings: Sequence[str]
    rows: list[list[str]]


def steps(result: Comparison) -> Table:
    """The timed steps, without the profiler."""
    rows = []
    for one in result.profiles:
        ours = next(other for other in result.profiles if (other.cell.contender, other.cell.how) == (OURS, one.cell.how))
        least, most = min(one.seconds), max(one.seconds)
        rows.append(
            [
                str(one.cell),
                ms(one.step * 1e6),
                f"{ms(least * 1e6)} to {ms(most * 1e6)}",
                f"{result.settings.tokens / one.step:,.0f}",
                f"{one.step / ours.step:.2f}",
            ]
        )
    count, contenders = result.settings.steps, len(result.profiles)
    turns = f", a step of each of the {contenders} in turn" if contenders > 1 else ""
    text = f"{count} steps without the profiler{turns}. Each counts as long as its slowest rank."
    return Table("Time of a step", text, ("", "median ms", "least to most", "tokens/s", "x shardwise's"), rows)


def breakdowns(result: Comparison) -> Table:
    """What the profiled step of each cell went to: means over the ranks."""
    rows = []
    for one in result.profiles:
        ranks = one.analysis.ranks
        means = [fmean(getattr(rank, name) for rank in ranks) for name in ("step", "compute", "wait", "transfer", "host")]
        known = [rank.bytes for rank in ranks if rank.bytes is not None]
        sent = f"{fmean(known) / 2**20:.2f}" if len(known) == len(ranks) else "-"
        grown = f"{max(rank.grown for rank in ranks) / 2**20:,.1f}"
        rows.append([str(one.cell), *map(ms, means), f"{ranks[0].calls}", sent, grown])
    text = (
        "The quickest of three steps under the profiler, which slows the host: compare the parts with each "
        f"other, and times with the table above. Means over the ranks. {meaning(result.device)} put in: by a rank into its "
        "collectives; grown: tensors' memory, at most, over that at the beginning."
    )
    headings = ("", "profiled ms", "compute", "wait", "transfer", "host", "collectives", "MiB put in", "MiB grown")
    return Table("What it went to", text, headings, rows)


def meaning(device: str) -> str:
    """What the columns are, on "cpu" or "cuda"."""
    if device == "cuda":
        return (
            "compute: a kernel or copy ran; wait and transfer: a communication kernel ran and no other, before and after "
            "the last rank's had begun; host: the device did nothing."
        )
    return (
        "compute: in an operator of torch; wait and transfer: in a collective, before and after the last rank had come to it; "
        "host: Python, autograd and dispatch."
    )


def ranks(profile: Profile) -> Table:
    """Each rank's profiled step."""
    rows = []
    for rank, one in enumerate(profile.analysis.ranks):
        times = map(ms, (one.step, one.compute, one.wait, one.transfer, one.host, one.communication))
        rows.append([f"rank {rank}", *times, f"{one.exposed / one.step:.0%}".replace("%", " %")])
    headings = ("", "step", "compute", "wait", "transfer", "host", "communication", "exposed")
    text = "communication: some collective was on its way. exposed: the share of the step in which nothing hid that."
    return Table("Ranks", text, headings, rows)


def layers(profile: Profile, *, together: bool) -> Table:
    """By layer and phase; `together`: layers of one kind as one row, with their mean."""
    parts = list(_alike(profile.analysis.layers) if together else ((part, 1) for part in profile.analysis.layers))
    rows = [
        [
            (part.name or OUTSIDE) + (f"  (each of {count})" if count > 1 else ""),
            part.phase,
            *(ms(value / count) for value in (part.total, part.compute, part.wait, part.transfer, part.host)),
        ]
        for part, count in parts
    ]
    text = "" if _has_modules(profile.analysis.layers) else "Compiled code calls no modules: there are no layers to be seen."
    return Table("Layers", text, ("", "phase", "total", "compute", "wait", "transfer", "host"), rows)


def modules(profile: Profile, most: int) -> Table:
    """By module and phase, layers of one kind taken together, the longest first."""
    rows = [
        [part.name or OUTSIDE, part.phase, *map(ms, (part.total, part.compute, part.wait, part.transfer, part.host))]
        for part in profile.analysis.modules[:most]
    ]
    return Table("Modules", "", ("", "phase", "total", "compute", "wait", "transfer", "host"), rows)


def operators(profile: Profile, most: int) -> Table:
    """By operator or kernel, the longest first."""
    everything = sum(part.compute for part in profile.analysis.operators)
    rows = [
        [_short(part.name), count(part.calls), ms(part.compute), f"{part.compute / everything:.0%}".replace("%", " %")]
        for part in profile.analysis.operators[:most]
    ]
    flops = profile.records[0].flops
    text = f"{flops / 1e9:,.3g} GFLOP on rank 0, in the operators whose number of operations torch knows." if flops else ""
    return Table("Operators", text, ("", "calls", "ms", "of compute"), rows)


def collectives(profile: Profile, most: int) -> Table:
    """By kind, module and phase, the longest first."""
    rows = [
        [part.name, part.phase, count(part.calls), *map(ms, (part.wait, part.transfer))]
        for part in profile.analysis.collectives[:most]
    ]
    return Table("Collectives", "", ("", "phase", "calls", "wait", "transfer"), rows)


def late(profile: Profile, most: int) -> Table:
    """The collectives that were waited for longest."""
    rows = [[one.name, f"rank {one.rank}", ms(one.by)] for one in profile.analysis.late[:most]]
    return Table("Who came last", f"{clock(profile)}", ("", "came last", "behind the first"), rows)


def clock(profile: Profile) -> str:
    """How far times of different ranks may be believed."""
    error, early = profile.analysis.clock_error, profile.analysis.clock_violation
    seen = f"; some rank seems to leave a collective {early:.1f} us before the last has come" if early else ""
    return f"The ranks' clocks agree to {error:.1f} us{seen}."


def contenders(result: Comparison) -> list[str]:
    """What each is, a line each."""
    return [what_it_is(name) for name in dict.fromkeys(one.cell.contender for one in result.profiles)]


def ms(microseconds: float) -> str:
    """Milliseconds, with three digits or more."""
    milliseconds = microseconds / 1e3
    if milliseconds >= 100:
        return f"{milliseconds:,.0f}"
    return f"{milliseconds:.{1 if milliseconds >= 10 else 2 if milliseconds >= 1 else 3}f}"


def count(calls: float) -> str:
    """A mean number of calls."""
    return f"{calls:,.0f}" if calls == round(calls) else f"{calls:,.1f}"


def _alike(parts: Iterable[Part]) -> list[tuple[Part, int]]:
    sums: dict[tuple[str, str], tuple[Part, int]] = {}
    for part in parts:
        key = (wildcard(part.name), part.phase)
        total, number = sums.get(key, (Part(*key), 0))
        total.add(calls=part.calls, compute=part.compute, wait=part.wait, transfer=part.transfer, host=part.host)
        sums[key] = (total, number + 1)
    return list(sums.values())


def _has_modules(parts: Sequence[Part]) -> bool:
    return any(part.name for part in parts)


def _short(name: str) -> str:
    """A kernel's name without its template arguments."""
    plain = re.sub(r"^void ", "", name)
    plain = plain if len(plain) <= 70 else re.sub(r"<.*", "<...>", plain)
    return plain if len(plain) <= 70 else plain[:67] + "..."
