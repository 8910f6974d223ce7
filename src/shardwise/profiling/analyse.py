"""From the ranks' traces of one cell to its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.names import layer_of
from shardwise.plan import wildcard
from shardwise.profiling.breakdown import Breakdown, Found, breakdown
from shardwise.profiling.calls import Call, clock_violation
from shardwise.profiling.parts import Part, by_collective, by_operator, by_place


@dataclass(frozen=True)
class Late:
    """A collective for which the others waited: `rank` came to it `by` microseconds after the first."""

    name: str
    rank: int
    by: float


@dataclass(frozen=True)
class Analysis:
    """All figures of one cell's profiled step.

    Attributes:
        ranks: a breakdown each.
        layers: by layer and phase, in the order in which they ran; "" for what is in none.
        modules: by module, with `*` for numbers, and phase; the longest first.
        operators: operators or kernels by name, the longest first.
        collectives: by kind and module, with `*` for numbers, and phase; the longest first.
        late: each collective and its last rank, the latest first.
        clock_error: by how much times of different ranks may be wrong to each other, in microseconds, as the marks say.
        clock_violation: by how much they are at least, as the collectives say: nobody can be done before the last has come.
    """

    ranks: list[Breakdown]
    layers: list[Part]
    modules: list[Part]
    operators: list[Part]
    collectives: list[Part]
    late: list[Late]
    clock_error: float
    clock_violation: float


def analyse(found: Sequence[Found], matches: Sequence[Sequence[Call]]) -> Analysis:
    """Of all ranks, and of the collectives in which they met."""
    return Analysis(
        ranks=[breakdown(one) for one in found],
        layers=by_place(found, layer_of).in_order(),
        modules=by_place(found, wildcard).by_total(),
        operators=by_operator(found).by_total(),
        collectives=by_collective(found, wildcard).by_total(),
        late=sorted((_late(calls) for calls in matches), key=lambda late: -late.by),
        clock_error=max(one.trace.clock.error for one in found),
        clock_violation=clock_violation(matches),
    )


def _late(calls: Sequence[Call]) -> Late:
    last = max(calls, key=lambda call: call.start)
    return Late(last.name, last.rank, last.start - min(call.start for call in calls))
