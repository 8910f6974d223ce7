"""Expressions over checkpoint tensors: what a tensor is made of, and the boxes it is read in.

An expression is a tree: what a source holds (`Leaf`), what is already in memory (`Const`), and operations on them (`Op`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_iter

from shardwise.lazy.views import Box, Shape


class Source(Protocol):
    """A tensor that can be read in boxes, such as one key of a checkpoint file."""

    @property
    def name(self) -> str:
        """What error messages call it: its key and its file."""

    @property
    def shape(self) -> Shape:
        """The full shape."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it is stored in."""

    def read(self, box: Box) -> Tensor:
        """The values in `box`, one half-open range a dim. May share memory with the source: the caller doesn't write to it."""


@dataclass(frozen=True, slots=True, eq=False)
class Expr:
    """A tensor that can be computed. Immutable, so that it may be shared by tensors, copies and threads."""

    shape: Shape
    stride: Shape
    dtype: torch.dtype

    def meta(self) -> Tensor:
        """A tensor of this shape, stride and dtype without data."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@dataclass(frozen=True, slots=True, eq=False)
class Leaf(Expr):
    """What a source holds."""

    source: Source


@dataclass(frozen=True, slots=True, eq=False)
class Const(Expr):
    """A tensor in memory, which nobody writes to."""

    tensor: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Op(Expr):
    """The result of `func`, or its `index`-th result. Tensors among `args` and `kwargs` stand there as expressions."""

    func: OpOverload
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    index: int | None

    def argument(self, position: int, name: str, default: object = None) -> object:
        """An argument of the call, however it was passed."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    @property
    def input(self) -> Expr:
        """The first argument, of an operation on one tensor."""
        return cast(Expr, self.args[0])


def leaf(source: Source) -> Leaf:
    """The expression of all that `source` holds."""
    shape = tuple(source.shape)
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return Leaf(shape, stride, source.dtype, source)


def const(tensor: Tensor) -> Const:
    """The expression of the values that `tensor` has now."""
    copy = tensor.detach().clone()
    return Const(tuple(copy.shape), tuple(copy.stride()), copy.dtype, copy)


def leaves(expr: Expr) -> Iterator[Source]:
    """The sources below `expr`, left to right, repeated where they are used twice."""
    if isinstance(expr, Leaf):
        yield expr.source
    elif isinstance(expr, Op):
        for item in tree_iter((expr.args, dict(expr.kwargs))):
            if isinstance(item, Expr):
                yield from leaves(item)


def same(first: object, second: object) -> bool:
    """Whether two expressions are the same operations on the same sources, so that nothing has to be read to know it."""
    if isinstance(first, Leaf) and isinstance(second, Leaf):
        return first.source == second.source
    if isinstance(first, Op) and isinstance(second, Op):
        named = (tuple(first.kwargs.items()), tuple(second.kwargs.items()))
        return (first.func, first.index) == (second.func, second.index) and same(first.args, second.args) and same(*named)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(map(same, first, second))
    return first is second if isinstance(first, Expr) or isinstance(second, Expr) else first == second


def full_box(shape: Sequence[int]) -> Box:
    """The box that takes all of a tensor of `shape`."""
    return tuple((0, length) for length in shape)


def lengths(box: Box) -> Shape:
    """The shape of what `box` takes."""
    return tuple(stop - start for start, stop in box)


def take(tensor: Tensor, box: Box) -> Tensor:
    """The part of a tensor in memory that lies in `box`: a view."""
    for dim, (start, stop) in enumerate(box):
        if (start, stop) != (0, tensor.shape[dim]):
            tensor = tensor.narrow(dim, start, stop - start)
    return tensor
