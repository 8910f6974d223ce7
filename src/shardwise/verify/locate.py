"""The first event, in the order of execution, at which the ranks have something else than one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.verify.arrange import Arrangement, Arrangements
from shardwise.verify.record import Key, Recorded

FORWARD, BACKWARD = 1e-4, 1e-3
"""Relative bounds, of the same reason as those of logits and gradients."""

_SMALL = 1e-3  # what should be zero is the noise of the sums that cancel in it
_JUMP = 10.0


@dataclass(frozen=True)
class Difference:
    """An event that differs.

    Attributes:
        key: which tensor.
        values: the ranks', in the order of the ranks.
        expected: the one process's.
        arrangement: how the ranks' lie.
        error: relative to the larger of the largest right value and `floor`.
        bound: what would have been accepted.
        floor: below which a value counts as noise of others.
    """

    key: Key
    values: tuple[Tensor, ...]
    expected: Tensor
    arrangement: Arrangement
    error: float
    bound: float
    floor: float

    @property
    def backward(self) -> bool:
        """Whether it is a gradient."""
        return self.key.kind.startswith("gradient")

    def error_of(self, given: Tensor) -> float:
        """As `error`, of another value in place of the ranks'."""
        return apart(given, self.expected, self.floor)


def first_difference(one: Recorded, ranks: Sequence[Recorded], places: Arrangements) -> Difference | None:
    """The first event that differs by more than noise, which grows from event to event, would explain."""
    floors = _floors(one)
    largest, candidate = 0.0, None
    for key, expected in one.events.items():
        found = difference_at(key, expected, ranks, places, floors[key.kind])
        if found is None:
            continue
        if found.error > found.bound and not _is_another_call(found, one):
            if not found.error <= _JUMP * largest:
                return found
            candidate = candidate or found
        elif found.error <= found.bound:
            largest = max(largest, found.error)
    return candidate


def _is_another_call(found: Difference, one: Recorded) -> bool:
    """Whether each rank's value is what some call of the module gave: a model may loop over a set of kinds of layers, in
    another order in each process.
    """
    if found.key.kind != "output":
        return False
    calls = [value for key, value in one.events.items() if key._replace(call=found.key.call) == found.key]
    wholes = found.arrangement.whole(found.values, found.expected)
    return all(any(apart(whole, value, found.floor) <= found.bound for value in calls) for whole in wholes)


def difference_at(
    key: Key, expected: Tensor, ranks: Sequence[Recorded], places: Arrangements, floor: float
) -> Difference | None:
    """How far the ranks are from one process at an event; None where that says nothing, or some rank did not get there."""
    arrangement = places.of(key)
    values = tuple(rank.events[key] for rank in ranks if key in rank.events)
    if arrangement is None or len(values) < len(ranks):
        return None
    error = max(apart(whole, expected, floor) for whole in arrangement.whole(values, expected))
    return Difference(
        key, values, expected, arrangement, error, BACKWARD if key.kind.startswith("gradient") else FORWARD, floor
    )


def floor_of(one: Recorded, key: Key) -> float:
    """Below which a value of that kind counts as noise of others."""
    return _floors(one)[key.kind]


def apart(given: Tensor, expected: Tensor, floor: float) -> float:
    """The largest |a - b| over the largest |b|, at least `floor`. Infinite for other shapes; what is infinite must be so in
    both.
    """
    if given.shape != expected.shape:
        return math.inf
    finite = expected.isfinite()
    if not torch.equal(finite, given.isfinite()):
        return math.inf
    if not finite.any():
        return 0.0
    given, expected = given[finite].double(), expected[finite].double()
    size = max(float(expected.abs().max()), floor)
    return float((given - expected).abs().max()) / size if size else (0.0 if torch.equal(given, expected) else math.inf)


def _floors(one: Recorded) -> dict[str, float]:
    floors: dict[str, float] = {}
    for key, value in one.events.items():
        finite = value[value.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        floors[key.kind] = max(floors.get(key.kind, 0.0), _SMALL * largest)
    return floors
