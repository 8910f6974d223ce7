"""The collectives in the ranks' traces: each call found, its place in the model, and its partners on the other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardwise.debug.operators import collective_of
from shardwise.profiling.events import Event, RankTrace
from shardwise.profiling.intervals import Interval

_WAIT = "_c10d_functional::wait_tensor"
_POINT_TO_POINT = ("send", "recv")
# In which no rank can be done before the last has come.
_EVERYONE_WAITS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier")

# What the name of a kernel says; the longer ones first. nccl sends and receives for an all-to-all, too.
_KERNELS = {
    "AllReduce": "all_reduce",
    "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter",
    "SendRecv": "all_to_all",
    "Broadcast": "broadcast",
    "Reduce": "reduce",
}


@dataclass(eq=False)
class Call:
    """One collective on one rank. Times in microseconds of the common clock.

    Attributes:
        rank: of the default group.
        kind: "all_reduce", ...
        phase, module: where in the model; "" for no module.
        start: when this rank was there: its kernel began, or, on CPUs, its call.
        end: when it was done: its kernel ended, or its call, or, of an asynchronous one, the wait for it.
        blocked: the pieces of that time in which the rank did this and could do nothing else there.
        known: shape, dtype, bytes and group, as in `Collective`; empty where they are not known.
        last: when the last rank was there; that of this rank alone where the others' are not known.
        last_rank: which one that was.
        number: of the match; -1 without one.
    """

    rank: int
    kind: str
    phase: str
    module: str
    start: float
    end: float
    blocked: list[Interval]
    known: dict[str, Any] = field(default_factory=dict)
    last: float = 0.0
    last_rank: int = -1
    number: int = -1

    def __post_init__(self) -> None:
        self.last, self.last_rank = self.start, self.rank

    @property
    def arrived(self) -> float:
        """When all ranks were there, as far as this one noticed: not before it came, not after it left."""
        return min(max(self.last, self.start), self.end)

    @property
    def wait(self) -> float:
        """From this rank's arrival to that of the last, in microseconds."""
        return self.arrived - self.start

    @property
    def transfer(self) -> float:
        """From the arrival of the last to the end, in microseconds."""
        return self.end - self.arrived

    @property
    def name(self) -> str:
        """As the trace calls it: "all_reduce model.layers.0.self_attn.o_proj forward"."""
        return " ".join(part for part in (self.kind, self.module, self.phase) if part)


def is_communication(name: str) -> bool:
    """Whether a range of the host is a collective, or the wait for one."""
    return name == _WAIT or collective_of(name) is not None


def is_communication_kernel(name: str) -> bool:
    """Whether a kernel is one of nccl's (or rccl's, whose kernels have the same names)."""
    return "nccl" in name.lower()


def find_calls(trace: RankTrace) -> list[Call]:
    """The collectives of one rank, in the order in which they were called."""
    kernels = _kernels(trace)
    found: list[tuple[Event, Call]] = []
    pending: list[tuple[Event, Call]] = []
    for event in sorted(_outermost(trace), key=lambda event: event.start):
        if event.name == _WAIT:
            _finish(event, pending)
            continue
        call = _call(trace, event, kernels.of.get(id(event), []))
        found.append((event, call))
        if event.name.startswith("_c10d_functional::") and not event.name.endswith("_out"):
            pending.append((event, call))
    calls = sorted([call for _, call in found] + kernels.alone, key=lambda call: call.start)
    known = trace.record.collectives
    if [call.kind for call in calls] == [one["op"] for one in known]:
        for call, one in zip(calls, known, strict=True):
            call.known = one
    return calls


def match_calls(ranks: Sequence[Sequence[Call]]) -> list[list[Call]]:
    """Which calls are one collective: the n-th on its group, on each of its ranks. Sets what `Call` says of the others."""
    matches: dict[tuple[tuple[int, ...], int], list[Call]] = {}
    for calls in ranks:
        turns: dict[tuple[int, ...], int] = {}
        for call in calls:
            if call.kind in _POINT_TO_POINT:
                continue
            group = tuple(call.known.get("ranks", ()))
            turn = turns[group] = turns.get(group, -1) + 1
            matches.setdefault((group, turn), []).append(call)
    together = [calls for calls in matches.values() if len({call.kind for call in calls}) == 1 and len(calls) > 1]
    for number, calls in enumerate(sorted(together, key=lambda calls: min(call.start for call in calls))):
        last = max(calls, key=lambda call: call.start)
        for call in calls:
            call.last, call.last_rank, call.number = last.start, last.rank, number
    return sorted(together, key=lambda calls: calls[0].number)


def clock_violation(matches: Sequence[Sequence[Call]]) -> float:
    """By how much a rank seems to have been done before the last one came, in microseconds: at least so wrong is the clock."""
    early = [call.last - call.end for calls in matches for call in calls if call.kind in _EVERYONE_WAITS]
    return max([0.0, *early])


def _outermost(trace: RankTrace) -> Iterator[Event]:
    waiting = [root for roots in trace.roots.values() for root in roots]
    while waiting:
        event = waiting.pop()
        if is_communication(event.name):
            yield event
        else:
            waiting += event.children


def _call(trace: RankTrace, event: Event, kernels: list[Event]) -> Call:
    phase, module = trace.place(event)
    spans = kernels or [event]
    return Call(
        rank=trace.rank,
        kind=collective_of(event.name) or "",
        phase=phase,
        module=module,
        start=min(one.start for one in spans),
        end=max(one.end for one in spans),
        blocked=[(one.start, one.end) for one in spans],
    )


def _finish(wait: Event, pending: list[tuple[Event, Call]]) -> None:
    """The oldest call that gives what is waited for, by its shape, or else the oldest, has ended."""
    if not pending:
        return
    given = _shape(wait)
    event, call = next((one for one in pending if _length(_shape(one[0])) == _length(given)), pending[0])
    pending.remove((event, call))
    if call.blocked == [(event.start, event.end)]:  # on the host; a kernel has its own end
        call.blocked.append((wait.start, wait.end))
        call.end = wait.end


def _shape(event: Event) -> list[int]:
    shapes = event.args.get("Input Dims") or [[]]
    return shapes[0] if isinstance(shapes[0], list) else []


def _length(shape: Sequence[Any]) -> int:
    length = 1
    for one in shape:
        length *= one if isinstance(one, int) else 1
    return length


@dataclass
class _Kernels:
    """The kernels that communicate: by the collective (its `id`) that launched them, or, from a CUDA graph, alone."""

    of: dict[int, list[Event]]
    alone: list[Call]


def _kernels(trace: RankTrace) -> _Kernels:
    found = _Kernels({}, [])
    for kernel in trace.device:
        if is_communication_kernel(kernel.name):
            launch = trace.launches[kernel.args["correlation"]]
            outer = [event for event in launch.above() if is_communication(event.name)]
            if outer:
                found.of.setdefault(id(outer[-1]), []).append(kernel)
            else:
                span = (kernel.start, kernel.end)
                found.alone.append(Call(trace.rank, _kind(kernel.name), *trace.place(launch), *span, [span]))
    return found


def _kind(kernel: str) -> str:
    return next((kind for part, kind in _KERNELS.items() if part in kernel), "send")
