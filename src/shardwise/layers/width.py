"""Attention that takes its width from its input's shape, on local heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from shardwise.layers.linear import ColwiseParallel
from shardwise.layers.replicated import LocalParamsParallel


class LocalWidth(LocalParamsParallel):
    """A module whose code takes the width of its local activations from its input, `B, T, C = x.shape`, and goes on with
    `q.view(B, T, heads, C // heads)`.

    It is handed x, (..., features) I, as a tensor that says of its shape that it is (..., input_width), and so does whatever
    has x's width in the module. Its layers of the style `colwise_whole_input` read it as it is.
    """

    prefix = "LocalWidth"
    input_width: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return tree_map(_as_it_is, super().forward(self._narrowed(args[0]), *args[1:], **kwargs))
        first = next(iter(kwargs))
        return tree_map(_as_it_is, super().forward(**(kwargs | {first: self._narrowed(kwargs[first])})))

    def _narrowed(self, x: Tensor) -> Tensor:
        return _narrow(x, x.shape[-1], self.input_width)


class ColwiseWholeInput(ColwiseParallel):
    """`ColwiseParallel` inside of a module of the style `local_width`: it reads its input as it is, whatever that says of its
    shape.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_as_it_is(input))


class _Narrow(Tensor):
    """A tensor in place of another one, whose code is told another width, `told`, than its `full` one."""

    stands_for: Tensor
    full: int
    told: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        narrow = next(one for one in tree_leaves((args, kwargs)) if isinstance(one, _Narrow))
        full, told = narrow.full, narrow.told
        found = func(*tree_map(_as_it_is, args), **tree_map(_as_it_is, kwargs))
        if func == _SHAPE or (func == Tensor.size and len(args) == 1 and not kwargs):
            return torch.Size((*found[:-1], told))
        if func == Tensor.size:
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return told if dim in (-1, _as_it_is(args[0]).dim() - 1) else found
        if isinstance(found, Tensor) and found.dim() and found.shape[-1] == full:
            return _narrow(found, full, told)
        return found


_SHAPE: Any = Tensor.shape.__get__  # type: ignore[attr-defined]


def _narrow(x: Tensor, full: int, told: int) -> Tensor:
    made = x.as_subclass(_Narrow)
    made.stands_for, made.full, made.told = x, full, told
    return made


def _as_it_is(value: Any) -> Any:
    return value.stands_for if isinstance(value, _Narrow) else value
