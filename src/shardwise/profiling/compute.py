"""Where a rank computes: pieces of time of torch's operators on CPUs, of kernels and copies on a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from shardwise.profiling.calls import is_communication, is_communication_kernel
from shardwise.profiling.events import Event, RankTrace

_NO_OPERATORS = ("autograd::", "torch::autograd::", "profiler::")
_SUBCLASS = "PythonSubclass"
_FUSED = re.compile(r"(graph_\d+_)?cpp_fused")


@dataclass(frozen=True, slots=True)
class Piece:
    """Time, in microseconds, in which an operator or kernel ran, and where in the model."""

    name: str
    start: float
    end: float
    phase: str
    module: str
    first: bool
    """Whether it is the first piece of its operator, that is, a call."""


def find_pieces(trace: RankTrace) -> list[Piece]:
    """What a rank computed, in no order. Those of a CPU are apart; those of a GPU's streams may overlap."""
    return list(_on_device(trace) if trace.record.device == "cuda" else _on_host(trace))


def _on_device(trace: RankTrace) -> Iterator[Piece]:
    for event in trace.device:
        if not is_communication_kernel(event.name):
            phase, module = trace.place(trace.launches[event.args["correlation"]])
            yield Piece(event.name, event.start, event.end, phase, module, first=True)


def _on_host(trace: RankTrace) -> Iterator[Piece]:
    """The time in an operator, but not in those that it calls: that is theirs."""
    waiting = [root for roots in trace.roots.values() for root in roots]
    while waiting:
        event = waiting.pop()
        if is_communication(event.name):
            continue
        waiting += event.children
        if computes(event):
            phase, module = trace.place(event)
            for number, (start, end) in enumerate(own_time(event)):
                yield Piece(event.name, start, end, phase, module, first=number == 0)


def own_time(event: Event) -> Iterator[tuple[float, float]]:
    """The time of a range that is in none of the ranges inside of it."""
    at = event.start
    for child in event.children:
        if child.start > at:
            yield at, child.start
        at = max(at, child.end)
    if event.end > at or not event.children:
        yield at, event.end


def computes(event: Event) -> bool:
    """Whether it is an operator that does something by itself.

    A tensor of a subclass, such as a DTensor, is handed to Python, which calls the operator on plain tensors: that is then
    inside, and the rest is the host's time.
    """
    if event.category != "cpu_op":
        return False
    if _FUSED.match(event.name):
        return True
    if "::" not in event.name or event.name.startswith(_NO_OPERATORS):
        return False
    return not any(below.name in (_SUBCLASS, event.name) for child in event.children for below in child.below())
