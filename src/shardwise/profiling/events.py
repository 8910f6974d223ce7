"""A rank's trace, read: its ranges as trees, a thread each, and the device's work, on the common clock."""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwise.profiling.capture import STEP, Record, record_file, trace_file
from shardwise.profiling.clock import MARK, Clock, fit
from shardwise.profiling.ranges import MODULE

HOST = ("cpu_op", "user_annotation")
LAUNCHES = ("cuda_runtime", "cuda_driver")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_NODE = "autograd::engine::evaluate_function"
_NO_NUMBER = 2**63
_ROUNDING = 0.01  # us: by so much a range may seem to outlast the one around it


@dataclass(slots=True, eq=False)
class Event:
    """A range of the trace. Times in microseconds of the common clock.

    Attributes:
        name, category: as torch gives them.
        thread: of the host, or the device's stream.
        start, end: of it.
        args: as torch gives them.
        parent, children: on the same thread; none for the device's work.
    """

    name: str
    category: str
    thread: int
    start: float
    end: float
    args: dict[str, Any]
    parent: Event | None = None
    children: list[Event] = field(default_factory=list)

    @property
    def duration(self) -> float:
        """In microseconds."""
        return self.end - self.start

    def above(self) -> Iterator[Event]:
        """This range, the one around it, and so on."""
        event: Event | None = self
        while event is not None:
            yield event
            event = event.parent

    def below(self) -> Iterator[Event]:
        """This range, and all inside of it, by their beginning."""
        yield self
        for child in self.children:
            yield from child.below()


@dataclass
class RankTrace:
    """The trace of one rank.

    Attributes:
        record: what the rank knew besides.
        raw: the trace as torch gave it.
        clock: from its time to the common one.
        roots: of the trees of the host's threads that call operators, by thread; of the ranges in the step.
        device: kernels and copies, by their beginning.
        launches: by correlation number, the host's call that launched a piece of the device's work.
        start, end: of the step.
    """

    record: Record
    raw: dict[str, Any]
    clock: Clock
    roots: dict[int, list[Event]]
    device: list[Event]
    launches: dict[int, Event]
    start: float
    end: float

    @property
    def rank(self) -> int:
        """Of the default group."""
        return self.record.rank

    @property
    def groups(self) -> int:
        """How many process groups there were."""
        return int(self.raw.get("distributedInfo", {}).get("pg_count", 1))

    def place(self, event: Event) -> tuple[str, str]:
        """Phase and module path of a host's range: "forward", "backward" or "recompute", and "" outside of any module."""
        module = ""
        for one in event.above():
            if one.name.startswith(MODULE) and not module:
                module = one.name.removeprefix(MODULE)
            if is_node(one):
                return ("recompute", module) if module else ("backward", self.module_of(node_number(one)))
        return "forward", module

    def module_of(self, number: int | None) -> str:
        """The module in whose forward the autograd node of this sequence number was made; "" for none that is known."""
        if number is None:
            return ""
        index = bisect_right(self.record.spans, number, key=lambda span: span[0]) - 1
        return self.record.spans[index][1] if index >= 0 else ""


def read_rank(folder: Path, rank: int) -> RankTrace:
    """What `Capture.save` has written for one rank."""
    record = Record.from_dict(json.loads(record_file(folder, rank).read_text(encoding="utf-8")))
    with gzip.open(trace_file(folder, rank), "rt", encoding="utf-8") as file:
        return make_trace(record, json.load(file))


def make_trace(record: Record, raw: dict[str, Any]) -> RankTrace:
    """The events of `raw`, a trace in Chrome's format with the marks of `record` in it, ordered."""
    ranges = [event for event in raw["traceEvents"] if event.get("ph") == "X"]
    clock = fit(sorted(float(event["ts"]) for event in ranges if event["name"] == MARK), record.marks, record.offset)
    host = [_event(event, clock) for event in ranges if event.get("cat") in (*HOST, *LAUNCHES)]
    device = [_event(event, clock) for event in ranges if event.get("cat") in DEVICE]
    step = next(event for event in host if event.name == STEP)
    inside = [event for event in host if event.start >= step.start and event.end <= step.end and event is not step]
    launches = {event.args["correlation"]: event for event in inside if "correlation" in event.args}
    launched = [event for event in device if event.args.get("correlation") in launches]
    roots: dict[int, list[Event]] = {}
    for event in _nested(inside):
        if event.parent is None:
            roots.setdefault(event.thread, []).append(event)
    # A backend's own threads show what is on its way there; who waits for it is seen on the threads that call it.
    roots = {thread: own for thread, own in roots.items() if any(e.category == "cpu_op" for r in own for e in r.below())}
    return RankTrace(record, raw, clock, roots, sorted(launched, key=lambda event: event.start), launches, step.start, step.end)


def _event(raw: dict[str, Any], clock: Clock) -> Event:
    start = float(raw["ts"])
    end = start + float(raw.get("dur", 0))
    thread = raw["tid"] if isinstance(raw["tid"], int) else -1
    return Event(raw["name"], raw["cat"], thread, clock.common(start), clock.common(end), raw.get("args", {}))


def _nested(events: Iterable[Event]) -> list[Event]:
    """The same events, each with its parent and children. What only overlaps (threads' own work in flight) is no child."""
    ordered = sorted(events, key=lambda event: (event.thread, event.start, -event.end))
    stack: list[Event] = []
    for event in ordered:
        while stack and (stack[-1].thread != event.thread or stack[-1].end + _ROUNDING < event.end):
            stack.pop()
        if stack:
            event.end = min(event.end, stack[-1].end)
            event.parent = stack[-1]
            stack[-1].children.append(event)
        stack.append(event)
    return ordered


def is_node(event: Event) -> bool:
    """Whether it is a node of autograd's graph in backward."""
    return event.name.startswith(_NODE)


def node_number(node: Event) -> int | None:
    """The sequence number that the node got in forward; None for those that have none, which accumulate gradients."""
    number = node.args.get("Sequence number")
    return number if isinstance(number, int) and 0 <= number < _NO_NUMBER else None
