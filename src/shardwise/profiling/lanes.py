"""Ranges of one thread, so that each is inside of another or apart from it, as a trace viewer needs them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_ROUNDING = 10  # ns


@dataclass(slots=True)
class Range:
    """A range to be shown. Times in ns, as whole numbers, so that what ends together ends together."""

    start: int
    end: int
    name: str
    category: str
    args: dict[str, Any]


def in_lanes(ranges: Iterable[Range]) -> list[list[Range]]:
    """The ranges, by their beginning, in as many lanes as it takes: what only overlaps goes to the next one."""
    lanes: list[list[Range]] = []
    open_ranges: list[list[Range]] = []
    for one in sorted(ranges, key=lambda one: (one.start, -one.end)):
        for lane, stack in zip(lanes, open_ranges, strict=True):
            if _fits(one, stack):
                stack.append(one)
                lane.append(one)
                break
        else:
            lanes.append([one])
            open_ranges.append([one])
    return lanes


def _fits(one: Range, stack: list[Range]) -> bool:
    while stack and stack[-1].end <= one.start:
        stack.pop()
    if stack and one.end > stack[-1].end:
        if one.end > stack[-1].end + _ROUNDING:
            return False
        one.end = stack[-1].end
    return True
