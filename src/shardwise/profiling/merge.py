"""One trace of all ranks for Perfetto: each rank a process, on the common clock, with arrows between those of a collective."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shardwise.profiling.backward import backward_ranges
from shardwise.profiling.breakdown import Found
from shardwise.profiling.calls import Call
from shardwise.profiling.clock import MARK
from shardwise.profiling.lanes import Range, in_lanes

COLLECTIVES, MAIN, STREAMS = 0, 1, 1000
"""Threads of each process: the collectives, the thread that runs the step, and the first of the device's streams."""

_DROPPED = ("Trace",)
_FLOWS = ("s", "t", "f")
_IDS = 1 << 32
_LANES = 10_000

JsonEvent = dict[str, Any]


def merge(found: Sequence[Found], matches: Sequence[Sequence[Call]], title: str) -> dict[str, Any]:
    """The trace, as an object in Chrome's format: times in microseconds from the beginning of the first rank's step."""
    zero = min(one.trace.start for one in found)
    events: list[JsonEvent] = []
    for one in found:
        events += _of_rank(one, zero)
    events += [arrow for calls in matches for arrow in _arrows(calls, zero)]
    return {"displayTimeUnit": "ms", "otherData": {"title": title}, "traceEvents": events}


def save_merged(merged: dict[str, Any], path: Path) -> None:
    """Write it, compressed: Perfetto opens it as it is."""
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=5) as file:
        json.dump(merged, file)


def _of_rank(found: Found, zero: float) -> Iterator[JsonEvent]:
    rank = found.trace.rank
    ranges: dict[int, list[Range]] = {}
    names = {COLLECTIVES: "collectives", MAIN: "main"}
    threads = _Threads(found, names)
    for raw in found.trace.raw["traceEvents"]:
        if raw.get("ph") == "X" and raw.get("cat") not in _DROPPED and raw["name"] != MARK:
            start, end = _times(found, raw)
            ranges.setdefault(threads.number(raw), []).append(
                Range(_ns(start - zero), _ns(end - zero), raw["name"], raw.get("cat", ""), raw.get("args", {}))
            )
    for start, end, name, thread in backward_ranges(found.trace):
        ranges.setdefault(threads.host(thread), []).append(Range(_ns(start - zero), _ns(end - zero), name, "module", {}))
    ranges[COLLECTIVES] = [part for call in found.calls for part in _call_ranges(call, zero)]
    yield from _row(rank)
    for thread, own in sorted(ranges.items()):
        for lane, nested in enumerate(in_lanes(own)):
            number = thread + lane * _LANES
            yield from _track(rank, number, names[thread] + (f" ({lane + 1})" if lane else ""))
            yield from (_complete(rank, number, one) for one in nested)
    yield from _others(found, zero, threads)


class _Threads:
    """Small numbers for threads and streams: those of torch may be the same for both."""

    def __init__(self, found: Found, names: dict[int, str]) -> None:
        self._names = names
        self._numbers: dict[object, int] = {}
        step = next(raw for raw in found.trace.raw["traceEvents"] if raw.get("name", "").startswith("ProfilerStep"))
        self._numbers[step["tid"]] = MAIN
        self._process = step["pid"]

    def number(self, raw: JsonEvent) -> int:
        """Of the thread or stream of an event."""
        if raw["pid"] != self._process:  # then it is the number of a device
            number = STREAMS + int(raw["tid"])
            self._names[number] = f"stream {raw['tid']}"
            return number
        return self.host(raw["tid"])

    def host(self, thread: object) -> int:
        """Of a host's thread."""
        number = self._numbers.setdefault(thread, len(self._numbers) + 1)
        self._names.setdefault(number, f"thread {number}")
        return number


def _times(found: Found, raw: JsonEvent) -> tuple[float, float]:
    start = float(raw["ts"])
    return found.trace.clock.common(start), found.trace.clock.common(start + float(raw.get("dur", 0)))


def _call_ranges(call: Call, zero: float) -> Iterator[Range]:
    start, arrived, end = _ns(call.start - zero), _ns(call.arrived - zero), _ns(call.end - zero)
    known = {name: call.known[name] for name in ("shape", "dtype", "bytes", "ranks") if name in call.known}
    times = {"wait us": round(call.wait, 3), "transfer us": round(call.transfer, 3), "last rank": call.last_rank}
    yield Range(start, end, call.name, "collective", known | times | {"number": call.number})
    if arrived > start:
        yield Range(start, arrived, f"wait for rank {call.last_rank}", "collective", {})
    if end > arrived:
        yield Range(arrived, end, "transfer", "collective", {})


def _arrows(calls: Sequence[Call], zero: float) -> Iterator[JsonEvent]:
    """From the last rank to each of the others, at the moment of its arrival, which lets them go on."""
    last = max(calls, key=lambda call: call.start)
    at = _ns(last.start - zero)
    for call in calls:
        if call is last or call.end <= last.start:
            continue
        shared = {"cat": "collective", "name": last.kind, "id": (call.number + 1) * _IDS + call.rank, "ts": at / 1e3}
        yield {"ph": "s", "pid": last.rank, "tid": COLLECTIVES, **shared}
        yield {"ph": "f", "bp": "e", "pid": call.rank, "tid": COLLECTIVES, **shared}


def _others(found: Found, zero: float, threads: _Threads) -> Iterator[JsonEvent]:
    """torch's own arrows (forward to backward, launch to kernel), and memory as a curve."""
    rank = found.trace.rank
    for raw in found.trace.raw["traceEvents"]:
        if raw.get("ph") in _FLOWS and isinstance(raw.get("id"), int):
            at = _ns(_times(found, raw)[0] - zero) / 1e3
            moved = {"pid": rank, "tid": threads.number(raw), "ts": at, "id": raw["id"] * 4096 + rank}
            yield raw | moved
        elif raw.get("name") == "[memory]":
            at = _ns(_times(found, raw)[0] - zero) / 1e3
            where = (
                "memory, MiB" if raw["args"].get("Device Type") == 0 else f"memory of device {raw['args']['Device Id']}, MiB"
            )
            allocated = {"allocated": raw["args"]["Total Allocated"] / 2**20}
            yield {"ph": "C", "name": where, "pid": rank, "tid": MAIN, "ts": at, "args": allocated}


def _row(rank: int) -> Iterator[JsonEvent]:
    for name, value in (("process_name", {"name": f"rank {rank}"}), ("process_sort_index", {"sort_index": rank})):
        yield {"ph": "M", "name": name, "pid": rank, "tid": 0, "ts": 0, "args": value}


def _track(rank: int, thread: int, name: str) -> Iterator[JsonEvent]:
    for what, value in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": thread})):
        yield {"ph": "M", "name": what, "pid": rank, "tid": thread, "ts": 0, "args": value}


def _complete(rank: int, thread: int, one: Range) -> JsonEvent:
    return {
        "ph": "X",
        "cat": one.category,
        "name": one.name,
        "pid": rank,
        "tid": thread,
        "ts": one.start / 1e3,
        "dur": (one.end - one.start) / 1e3,
        "args": one.args,
    }


def _ns(microseconds: float) -> int:
    return round(microseconds * 1e3)
