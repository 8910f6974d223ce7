"""What the step went to by layer, by module, by operator and by collective: means over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from shardwise.profiling.breakdown import Found, exposed
from shardwise.profiling.calls import is_communication
from shardwise.profiling.compute import computes, own_time
from shardwise.profiling.events import Event, RankTrace

Key = tuple[str, str]


@dataclass
class Part:
    """A part of a step, in microseconds on a rank.

    Attributes:
        name: of the layer, module, operator or collective.
        phase: "forward", "backward" or "recompute"; "" where they are counted together.
        calls: of operators and collectives.
        compute, wait, transfer: as in `Breakdown`.
        host: other time in which the host was there; 0 on a GPU, ahead of which the host runs.
    """

    name: str
    phase: str
    calls: float = 0.0
    compute: float = 0.0
    wait: float = 0.0
    transfer: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.wait + self.transfer + self.host

    def add(
        self, *, calls: float = 0.0, compute: float = 0.0, wait: float = 0.0, transfer: float = 0.0, host: float = 0.0
    ) -> None:
        """More of it."""
        self.calls += calls
        self.compute += compute
        self.wait += wait
        self.transfer += transfer
        self.host += host


class Parts:
    """Parts by name and phase, in the order in which they came; means over `ranks`."""

    def __init__(self, ranks: int) -> None:
        self._share = 1 / ranks
        self._parts: dict[Key, Part] = {}

    def add(self, name: str, phase: str, **more: float) -> None:
        """Of one rank."""
        part = self._parts.setdefault((name, phase), Part(name, phase))
        part.add(**{what: amount * self._share for what, amount in more.items()})

    def in_order(self) -> list[Part]:
        """As they came."""
        return list(self._parts.values())

    def by_total(self) -> list[Part]:
        """The longest first."""
        return sorted(self._parts.values(), key=lambda part: -part.total)


def by_place(found: Sequence[Found], name: Callable[[str], str]) -> Parts:
    """By phase and what `name` makes of a module's path."""
    parts = Parts(len(found))
    for one in found:
        compute = one.compute()
        for piece in sorted(one.pieces, key=lambda piece: piece.start):
            parts.add(name(piece.module), piece.phase, calls=piece.first, compute=piece.end - piece.start)
        for call in one.calls:
            shown = exposed([call], compute)
            parts.add(name(call.module), call.phase, calls=1, wait=shown.wait, transfer=shown.transfer)
        if one.trace.record.device == "cpu":
            for event in _neither(one.trace):
                phase, module = one.trace.place(event)
                parts.add(name(module), phase, host=sum(end - start for start, end in own_time(event)))
    return parts


def by_operator(found: Sequence[Found]) -> Parts:
    """Of compute, by operator or kernel."""
    parts = Parts(len(found))
    for one in found:
        for piece in one.pieces:
            parts.add(piece.name, "", calls=piece.first, compute=piece.end - piece.start)
    return parts


def by_collective(found: Sequence[Found], name: Callable[[str], str]) -> Parts:
    """Of communication, by kind, module and phase."""
    parts = Parts(len(found))
    for one in found:
        compute = one.compute()
        for call in one.calls:
            shown = exposed([call], compute)
            parts.add(name(f"{call.kind} {call.module}".strip()), call.phase, calls=1, wait=shown.wait, transfer=shown.transfer)
    return parts


def _neither(trace: RankTrace) -> Iterator[Event]:
    """The host's ranges that neither compute nor communicate."""
    waiting = [root for roots in trace.roots.values() for root in roots]
    while waiting:
        event = waiting.pop()
        if not is_communication(event.name):
            waiting += event.children
            if not computes(event):
                yield event
