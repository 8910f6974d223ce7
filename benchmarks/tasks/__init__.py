"""What is measured. Each module has `prepare(adapter, folder, **options)`, which makes a step ready and runs it some times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Figures = dict[str, float]


@dataclass
class Prepared:
    """A step to be timed.

    Args:
        step: what is timed; it returns figures of its own where the time of all of it is not what counts.
        count: tokens, or whatever else is counted, in a step: the time is divided by it.
        facts: what was found before any round: numbers of graphs, seconds of compiling.
        notes: what was not possible, and why.
    """

    step: Callable[[], Figures | None]
    count: int = 1
    facts: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def warm(step: Callable[[], object], times: int) -> None:
    """Run a step some times."""
    for _ in range(times):
        step()
