"""Traces made by hand, with the times of a profiler of their own for each rank; and a strict reader of merged ones."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from shardwise.profiling.capture import STEP, Record
from shardwise.profiling.clock import MARK, Mark, Offset
from shardwise.profiling.events import RankTrace, make_trace


@dataclass
class Tape:
    """A trace that is written range by range, in microseconds of the common time, which is the host's.

    Args:
        rank: whose.
        base: what this rank's profiler calls 0.
        rate: how fast its clock goes.
        device: "cpu" or "cuda".
    """

    rank: int
    base: float = 1e9
    rate: float = 1.0
    device: str = "cpu"
    spans: list[tuple[int, str]] = field(default_factory=list)
    collectives: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, start: float, end: float, cat: str = "cpu_op", tid: int = 77, **args: Any) -> Tape:
        """A range."""
        ts = self.base + start * self.rate
        made = {"ph": "X", "cat": cat, "name": name, "pid": 4242, "tid": tid, "ts": ts, "dur": (end - start) * self.rate}
        self.events.append({**made, "args": args})
        return self

    def kernel(self, name: str, start: float, end: float, stream: int, launched: float, number: int) -> Tape:
        """A kernel, and the call that launches it."""
        self.add("cudaLaunchKernel", launched, launched + 2, "cuda_runtime", correlation=number)
        self.add(name, start, end, "kernel", stream, correlation=number, stream=stream)
        self.events[-1]["pid"] = 0
        for ph, pid, tid, at in (("s", 4242, 77, launched), ("f", 0, stream, start)):
            shared = {"cat": "ac2g", "name": "ac2g", "id": number, "ts": self.base + at * self.rate}
            self.events.append({"ph": ph, "pid": pid, "tid": tid, **shared})
        return self

    def read(self, end: float) -> RankTrace:
        """The trace, of a step from 0 to `end`."""
        self.add(STEP, 0, end, "user_annotation")
        marks = []
        for at in (-200.0, -100.0, end + 100, end + 200):
            self.add(MARK, at, at + 1, "user_annotation")
            marks.append(Mark(round(at * 1e3) - 500, round(at * 1e3) + 500))
        known = {"threads": 1, "offset": Offset(), "flops": 0.0, "backend": "gloo", "seconds": [1.0]}
        record = Record(self.rank, 2, self.device, marks=marks, spans=self.spans, collectives=self.collectives, **known)
        return make_trace(record, {"traceEvents": self.events, "displayTimeUnit": "ms"})


@dataclass
class Seen:
    """What a strict reader found: names by process, tracks by process, complete events, and arrows as pairs of ends."""

    processes: dict[int, str]
    tracks: dict[int, dict[int, str]]
    ranges: list[dict[str, Any]]
    arrows: list[tuple[dict[str, Any], dict[str, Any]]]


def read_strictly(trace: dict[str, Any]) -> Seen:
    """Read a merged trace, and assert all that a viewer takes for granted."""
    processes: dict[int, str] = {}
    tracks: dict[int, dict[int, str]] = defaultdict(dict)
    ranges, ends = [], defaultdict(dict)
    for event in trace["traceEvents"]:
        assert isinstance(event["pid"], int), event
        assert isinstance(event["tid"], int), event
        if event["ph"] == "M":
            if event["name"] == "process_name":
                assert event["pid"] not in processes, event
                processes[event["pid"]] = event["args"]["name"]
            elif event["name"] == "thread_name":
                assert event["tid"] not in tracks[event["pid"]], event
                tracks[event["pid"]][event["tid"]] = event["args"]["name"]
        elif event["ph"] == "X":
            assert event["dur"] >= 0, event
            ranges.append(event)
        elif event["ph"] in ("s", "f"):
            key = (event["cat"], event["name"], event["id"])
            assert event["ph"] not in ends[key], f"two arrows are {key}"
            ends[key][event["ph"]] = event
        else:
            assert event["ph"] in ("C", "i"), event
    by_track = defaultdict(list)
    for event in ranges:
        assert event["tid"] in tracks[event["pid"]], f"a track without a name: {event}"
        by_track[event["pid"], event["tid"]].append(event)
    for own in by_track.values():
        _assert_nested(own)
    assert set(tracks) == set(processes)
    arrows = []
    for key, both in ends.items():
        assert both.keys() == {"s", "f"}, f"half of an arrow: {key}"
        assert both["s"]["ts"] <= both["f"]["ts"], f"an arrow back in time: {key}"
        for end in both.values():
            assert _covers(by_track[end["pid"], end["tid"]], end["ts"]), f"an arrow to nothing: {end}"
        arrows.append((both["s"], both["f"]))
    return Seen(processes, dict(tracks), ranges, arrows)


def _ns(event: dict[str, Any]) -> tuple[int, int]:
    start = round(event["ts"] * 1e3)
    return start, start + round(event["dur"] * 1e3)


def _assert_nested(ranges: list[dict[str, Any]]) -> None:
    stack: list[tuple[int, int]] = []
    for start, end in sorted(map(_ns, ranges), key=lambda span: (span[0], -span[1])):
        while stack and stack[-1][1] <= start:
            stack.pop()
        assert not stack or end <= stack[-1][1], f"{start} to {end} overlaps {stack[-1]}"
        stack.append((start, end))


def _covers(ranges: list[dict[str, Any]], at: float) -> bool:
    return any(event["ts"] - 0.01 <= at <= event["ts"] + event["dur"] + 0.01 for event in ranges)  # us, rounded
