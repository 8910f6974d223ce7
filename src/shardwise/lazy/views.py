"""Which part of a tensor a box of its `view` needs: index arithmetic for splitting and merging neighbouring dims.

(4, 6) seen as (24,), box [7, 17)       ->   rows 1 to 3, of which the elements 1 to 11 are the answer
(24,) seen as (4, 6), box [1, 3) x all  ->   elements 6 to 18, exactly
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

Box = tuple[tuple[int, int], ...]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring dims before and after the view that hold the same elements, and what of them is needed.

    In the group's row-major order, `before` takes the elements [outer[0], outer[1]), the covering of the wanted box in the new
    dims takes [inner[0], inner[1]), which lies inside; `after` is the covering's shape and `wanted` the box within it.
    """

    before: Box
    outer: tuple[int, int]
    inner: tuple[int, int]
    after: Shape
    wanted: Box

    @property
    def exact(self) -> bool:
        return self.outer == self.inner and self.after == tuple(stop - start for start, stop in self.wanted)


@dataclass(frozen=True, slots=True)
class Cover:
    """The box to read before a view, and how to get at the wanted part of it."""

    box: Box
    groups: tuple[_Group, ...]

    @property
    def exact(self) -> bool:
        """Whether `box` holds nothing but the wanted elements."""
        return all(group.exact for group in self.groups)

    def extract(self, tensor: Tensor) -> Tensor:
        """The wanted box, from the contiguous `tensor` that was read from `box`: a view of it, or a copy."""
        tensor = tensor.reshape([group.outer[1] - group.outer[0] for group in self.groups])
        for dim, group in enumerate(self.groups):
            tensor = tensor.narrow(dim, group.inner[0] - group.outer[0], group.inner[1] - group.inner[0])
        tensor = tensor.reshape([length for group in self.groups for length in group.after])
        for dim, (start, stop) in enumerate(bounds for group in self.groups for bounds in group.wanted):
            tensor = tensor.narrow(dim, start, stop - start)
        return tensor


def cover(before: Shape, after: Shape, box: Box) -> Cover | None:
    """The smallest box of a tensor of shape `before` that holds `box` of its view of shape `after`; None for empty tensors."""
    if 0 in before or any(start >= stop for start, stop in box):
        return None
    groups = []
    for old, new in _groups(before, after):
        inner, covering, wanted = _flat_range([after[dim] for dim in new], [box[dim] for dim in new])
        bounds, outer = _covering_box([before[dim] for dim in old], inner)
        groups.append(_Group(bounds, outer, inner, covering, wanted))
    return Cover(tuple(bounds for group in groups for bounds in group.before), tuple(groups))


def _groups(before: Shape, after: Shape) -> Iterator[tuple[range, range]]:
    """The shortest runs of dims with the same number of elements on both sides; dims of length 1 may be left for the last."""
    old = new = 0
    while old < len(before) or new < len(after):
        first_old, first_new = old, new
        old, new = min(old + 1, len(before)), min(new + 1, len(after))
        while (left := math.prod(before[first_old:old])) != (right := math.prod(after[first_new:new])):
            if left < right:
                old += 1
            else:
                new += 1
        yield range(first_old, old), range(first_new, new)


def _flat_range(shape: Sequence[int], box: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], Shape, Box]:
    """A run of elements around `box`, as a range; its shape, in as many dims; and the box within it."""
    start, covering, wanted = 0, list[int](), list[tuple[int, int]]()
    inside = False
    for dim, (low, high) in enumerate(box):
        if inside:  # a dim before this one takes several indices, so a run has to take all of this one
            covering.append(shape[dim])
            wanted.append((low, high))
            continue
        start += low * math.prod(shape[dim + 1 :])
        covering.append(high - low)
        wanted.append((0, high - low))
        inside = high - low > 1
    return (start, start + math.prod(covering)), tuple(covering), tuple(wanted)


def _covering_box(shape: Sequence[int], elements: tuple[int, int]) -> tuple[Box, tuple[int, int]]:
    """The smallest box of `shape` that is a run of elements and holds the run `elements`; and its own run."""
    start, stop = elements
    origin, box = 0, list[tuple[int, int]]()
    for dim in range(len(shape)):
        size = math.prod(shape[dim + 1 :])
        low, high = start // size, -(-stop // size)
        box.append((low, high))
        origin += low * size
        start, stop = start - low * size, stop - low * size
        if high - low > 1:
            return (*box, *((0, length) for length in shape[dim + 1 :])), (origin, origin + (high - low) * size)
    return tuple(box), (origin, origin + 1)
