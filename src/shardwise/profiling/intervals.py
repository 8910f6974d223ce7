"""Arithmetic on pieces of time: lists of (start, end), in one unit."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in pieces that are ordered and apart."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > start:
            merged.append((start, end))
    return merged


def subtract(these: Iterable[Interval], those: Iterable[Interval]) -> list[Interval]:
    """What of `these` is not in `those`, ordered and apart."""
    left: list[Interval] = []
    taken = union(those)
    first = 0
    for start, end in union(these):
        while first < len(taken) and taken[first][1] <= start:
            first += 1
        index = first
        while index < len(taken) and taken[index][0] < end:
            if taken[index][0] > start:
                left.append((start, taken[index][0]))
            start = max(start, taken[index][1])
            index += 1
        if start < end:
            left.append((start, end))
    return left


def length(intervals: Iterable[Interval]) -> float:
    """Of ordered pieces that are apart."""
    return sum(end - start for start, end in intervals)


def clip(intervals: Iterable[Interval], start: float, end: float) -> list[Interval]:
    """What of `intervals` lies between `start` and `end`."""
    return [(max(a, start), min(b, end)) for a, b in intervals if min(b, end) > max(a, start)]
