"""What of a plan a person should know: what every rank keeps whole, and what several ranks keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwise.plan.table import Plan
    from shardwise.spec import ShardSpec, Source

FULL_SHARE = 1.05
"""A rank that holds more than this many times its part of the model is worth a word."""
_WORTH_NAMING = 0.005  # of what a rank holds
_NAMED = 6


def notes(plan: Plan) -> list[str]:
    """A sentence for each; none where everything is cut evenly."""
    return [] if plan.size == 1 else [*_share(plan), *_whole(plan), *_kept_by_several(plan)]


def _share(plan: Plan) -> Iterator[str]:
    if plan.share > FULL_SHARE:
        yield f"The fullest rank holds {plan.share:.2f} times its part (1/{plan.size}) of the model."


def _whole(plan: Plan) -> Iterator[str]:
    """Parameters that every rank keeps, the largest first."""
    found: dict[str, list[ShardSpec]] = {}
    for name, rows in plan.families.items():
        if not rows[0].sharded:
            found.setdefault(rows[0].rule.pattern if rows[0].rule else name, []).extend(rows)
    sizes = {name: sum(row.bytes for row in rows) for name, rows in found.items()}
    large = [name for name in sorted(found, key=lambda name: -sizes[name]) if sizes[name] > _WORTH_NAMING * plan.fullest_bytes]
    for name in large[:_NAMED]:
        share = sizes[name] / plan.fullest_bytes
        size = f"{sizes[name] / 2**20:,.2f} MiB, {share:.1%} of what a rank holds"
        yield f"{name}: whole on every rank{_why(found[name])}: {size}."
    if rest := large[_NAMED:]:
        yield f"{len(rest)} more are whole on every rank: {sum(sizes[name] for name in rest) / 2**20:,.2f} MiB together."


_BY: Mapping[Source, str] = MappingProxyType(
    {
        "model": "by a rule of the model",
        "user": "by a rule of the user",
        "shardwise": "by a rule of shardwise",
        "inferred": "as inferred",
        "frozen": "by the frozen plan",
    }
)


def _why(rows: Sequence[ShardSpec]) -> str:
    rule = rows[0].rule
    if rule is None:
        return ", no rule names it"
    return f" {_BY[rule.source]} ({rule.style})"


def _kept_by_several(plan: Plan) -> Iterator[str]:
    """Parameters of which each rank holds a part that others hold, too: KV heads that are fewer than the ranks."""
    found: dict[tuple[str, int, int], list[str]] = {}
    for name, rows in plan.families.items():
        row, size = rows[0], plan.place(rows[0], 0)[1]
        copies = row.layout.copies(row.shape, size) if row.sharded and not row.buffer else 1
        cut = row.layout.cut(row.shape)
        if copies > 1 and cut is not None:
            units = {block.units for block in cut[1] if block.copies(size) > 1 and block.spread == "share"}
            found.setdefault((f"{units.pop()} heads" if len(units) == 1 else "parts", size, copies), []).append(name)
    for (what, size, copies), names in found.items():
        last = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        yield f"{last}: {what} on {size} ranks, so that each is kept by {copies}; their gradients are summed."
