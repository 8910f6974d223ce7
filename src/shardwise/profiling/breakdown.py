"""What the step of one rank went to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from shardwise.profiling.calls import Call, find_calls, match_calls
from shardwise.profiling.compute import Piece, find_pieces
from shardwise.profiling.events import RankTrace
from shardwise.profiling.intervals import Interval, clip, length, subtract, union


@dataclass(frozen=True)
class Found:
    """What was found in the trace of one rank."""

    trace: RankTrace
    pieces: list[Piece]
    calls: list[Call]

    def compute(self) -> list[Interval]:
        """When something computed, in the step; ordered and apart."""
        return union(clip(((piece.start, piece.end) for piece in self.pieces), self.trace.start, self.trace.end))


def find(traces: Sequence[RankTrace]) -> tuple[list[Found], list[list[Call]]]:
    """What each rank did, and which calls are one collective: none where there are several groups, and calls that name none."""
    found = [Found(trace, find_pieces(trace), find_calls(trace)) for trace in traces]
    sure = all(one.trace.groups < 2 or all(call.known for call in one.calls) for one in found)
    return found, match_calls([one.calls for one in found]) if sure else []


@dataclass(frozen=True)
class Exposed:
    """Microseconds in which a rank was in a collective and did not compute: until the last rank had come, and from then on."""

    wait: float
    transfer: float


def exposed(calls: Sequence[Call], compute: Sequence[Interval]) -> Exposed:
    """Of some collectives of a rank that computed at these times."""
    waiting = subtract((span for call in calls for span in clip(call.blocked, call.start, call.arrived)), compute)
    both = subtract((span for call in calls for span in call.blocked), compute)
    return Exposed(length(waiting), length(both) - length(waiting))


@dataclass(frozen=True)
class Breakdown:
    """What the profiled step of one rank went to, in microseconds: `compute + wait + transfer + host = step`.

    Attributes:
        step: from its beginning to its end.
        compute: some operator (on CPUs) or kernel (on a GPU) computed.
        communication: some collective was on its way: from the rank's arrival to the end.
        wait, transfer: see `Exposed`. Together they are the exposed communication, that which compute does not hide.
        host: nothing of this: Python, autograd, dispatch, launches.
        calls: how many collectives.
        bytes: that the rank put into them; None where that is not known.
        grown: bytes by which its tensors on the device were at most more than when it began.
    """

    step: float
    compute: float
    communication: float
    wait: float
    transfer: float
    host: float
    calls: int
    bytes: int | None
    grown: int

    @property
    def exposed(self) -> float:
        """Communication that compute does not hide, in microseconds."""
        return self.wait + self.transfer


def breakdown(found: Found) -> Breakdown:
    """Of one rank."""
    trace, calls, compute = found.trace, found.calls, found.compute()
    shown = exposed(calls, compute)
    known = [call.known["bytes"] for call in calls if call.known]
    return Breakdown(
        step=trace.end - trace.start,
        compute=length(compute),
        communication=length(union(clip(((call.start, call.end) for call in calls), trace.start, trace.end))),
        wait=shown.wait,
        transfer=shown.transfer,
        host=trace.end - trace.start - length(compute) - shown.wait - shown.transfer,
        calls=len(calls),
        bytes=sum(known) if len(known) == len(calls) else None,
        grown=_grown(trace),
    )


def _grown(trace: RankTrace) -> int:
    of_device = {"cpu": 0, "cuda": 1}[trace.record.device]  # torch's numbers for types of devices
    changes = sorted(
        (at, int(raw["args"]["Bytes"]))
        for raw in trace.raw["traceEvents"]
        if raw.get("name") == "[memory]" and raw["args"].get("Device Type") == of_device
        for at in [trace.clock.common(float(raw["ts"]))]
        if trace.start <= at <= trace.end
    )
    return max(0, *accumulate(change for _, change in changes), 0)
