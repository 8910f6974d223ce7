"""Attention that takes its width from its input's shape, on local heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shardwise.layers.linear import ColwiseParallel
from shardwise.layers.replicated import LocalParamsParallel


class LocalWidth(LocalParamsParallel):
    """A module whose code takes the width of its local activations from its input, `B, T, C = x.shape`, and goes on with
    `q.view(B, T, heads, C // heads)`.

    It is handed a stand-in for x, (..., features) I -> (..., input_width), without values: all of it is NaN, and takes no
    memory, so that whatever else reads it is sure to be noticed. Its layers of the style `colwise_whole_input` read x itself.
    """

    prefix = "LocalWidth"
    input_width: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return super().forward(self._stand_in(args[0]), *args[1:], **kwargs)
        first = next(iter(kwargs))
        return super().forward(**(kwargs | {first: self._stand_in(kwargs[first])}))

    def _stand_in(self, x: Tensor) -> Tensor:
        made = x.new_full((), float("nan")).expand(*x.shape[:-1], self.input_width)
        made.stands_for = x  # type: ignore[attr-defined]
        return made


class ColwiseWholeInput(ColwiseParallel):
    """`ColwiseParallel` inside of a module of the style `local_width`: of a stand-in it reads the input that it stands for."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(getattr(input, "stands_for", input))
