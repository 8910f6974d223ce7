"""One clock for all ranks: every rank's profiler counts from a point of its own, so each trace is tied to the host's clock.

A mark is an empty range in the trace, and what the host's monotonic clock said around its beginning. Marks before and after the
step tie the two, drift included. Processes of one host share that clock; between hosts the difference is found by asking rank 0
for the time, as NTP does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch._C._distributed_c10d import Store
from torch.profiler import record_function

MARK = "shardwise clock"
_MARKS, _ASKED = 16, 16


@dataclass(frozen=True)
class Mark:
    """The host's clock, in ns, before and after the beginning of a range called `MARK`."""

    before: int
    after: int

    @property
    def width(self) -> int:
        """How uncertain it is, in ns."""
        return self.after - self.before


def make_marks() -> list[Mark]:
    """Marks in the trace that is being recorded."""
    marks = []
    for _ in range(_MARKS):
        mark = record_function(MARK)
        before = time.monotonic_ns()
        mark.__enter__()
        marks.append(Mark(before, time.monotonic_ns()))
        mark.__exit__(None, None, None)
    return marks


@dataclass(frozen=True)
class Clock:
    """From microseconds of a trace to microseconds of the common clock: `common = trace * rate + shift`, around `origin`.

    Attributes:
        error: by how much it may be wrong, in microseconds: half of what the best marks leave open, and what the exchange with
            another host does.
    """

    origin: float
    shift: float
    rate: float
    error: float

    def common(self, trace: float) -> float:
        """The common time of a time in the trace."""
        return self.shift + (trace - self.origin) * self.rate


def fit(starts: Sequence[float], marks: Sequence[Mark], offset: Offset) -> Clock:
    """The clock of a trace in which the marks begin at `starts` (us); the first half of them stood before the step."""
    half = len(marks) // 2
    pairs = list(zip(starts, marks, strict=True))
    first, last = (min(part, key=lambda pair: pair[1].width) for part in (pairs[:half], pairs[half:]))
    begin, end = ((start, (mark.before + mark.after) / 2e3) for start, mark in (first, last))
    rate = (end[1] - begin[1]) / (end[0] - begin[0])
    error = max(first[1].width, last[1].width) / 2e3
    return Clock(begin[0], begin[1] + offset.ns / 1e3, rate, error + offset.error / 1e3)


@dataclass(frozen=True)
class Offset:
    """What has to be added to this host's clock to have rank 0's, and how wrong that may be; in ns."""

    ns: float = 0.0
    error: float = 0.0


def this_host() -> str:
    """The same for all processes that share a monotonic clock: the name of this boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def host_offset(store: Store, rank: int, size: int, host: str) -> Offset:
    """Between this host's clock and that of rank 0, by asking rank 0 through the store. Collective."""
    turn = f"shardwise/clock/{store.add(f'shardwise/clock/turn/{rank}', 1)}"
    store.set(f"{turn}/host/{rank}", host)
    first = store.get(f"{turn}/host/0").decode()
    if rank:
        return Offset() if first == host else _ask(store, f"{turn}/{rank}")
    for other in range(1, size):
        if store.get(f"{turn}/host/{other}").decode() != host:
            _answer(store, f"{turn}/{other}")
    return Offset()


def _ask(store: Store, prefix: str) -> Offset:
    found = []
    for number in range(_ASKED):
        asked = time.monotonic_ns()
        store.set(f"{prefix}/asked/{number}", "")
        theirs = int(store.get(f"{prefix}/time/{number}"))
        answered = time.monotonic_ns()
        found.append(Offset(theirs - (asked + answered) / 2, (answered - asked) / 2))
    return min(found, key=lambda offset: offset.error)


def _answer(store: Store, prefix: str) -> None:
    for number in range(_ASKED):
        store.get(f"{prefix}/asked/{number}")
        store.set(f"{prefix}/time/{number}", str(time.monotonic_ns()))
