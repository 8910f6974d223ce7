"""Products that no linear layer computes: with stacked matrices, and by einsum with parameters of three dims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwise.collectives import copy_to_tp, reduce_from_tp
from shardwise.layers.base import Cut, ParallelStyle
from shardwise.layers.replicated import LocalParamsParallel
from shardwise.layout import Layout, Shape


class StackedStyle(ParallelStyle):
    """What the styles of a module with one parameter `weight`, (experts, out, in), share."""

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        own = {name: p for name, p in module._parameters.items() if p is not None}
        fits = own.keys() == {"weight"} and own["weight"].dim() == 3
        return (
            None if fits else f"{type(module).__name__} is no product with stacked matrices: (experts, out, in), without a bias"
        )


class StackedColwise(StackedStyle):
    """Each expert's rows split.  X (tokens, in) I -> Y (tokens, out/tp) S(-1); further arguments as they are."""

    prefix = "StackedColwise"

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        return cut.along(1)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(copy_to_tp(input, self._tp.mesh), *args, **kwargs)


class StackedRowwise(StackedStyle):
    """Each expert's columns split.  X (tokens, in/tp) S(-1) -> Y (tokens, out) I; further arguments as they are."""

    prefix = "StackedRowwise"

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        return cut.along(2)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return reduce_from_tp(super().forward(input, *args, **kwargs), self._tp.mesh)


class EinsumParallel(LocalParamsParallel):
    """A module that multiplies by its parameters in einsum, (features, heads, dims), which are cut between heads.

    By the letter of the cut dim: one that the product adds makes it column-wise, one that it sums over row-wise.
    """

    prefix = "Einsum"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Products(self):
            return super().forward(*args, **kwargs)


class _Products(TorchFunctionMode):
    def __init__(self, module: ParallelStyle) -> None:
        super().__init__()
        self._mesh = module._tp.mesh
        self._dims: dict[int, int] = {}
        for name, (layout, shape) in module._tp.layouts.items():
            if (cut := layout.cut(shape)) is not None:
                self._dims[id(module._parameters[name])] = cut[0]

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is not torch.einsum or len(args) != 3 or id(args[2]) not in self._dims:
            return function(*args, **(kwargs or {}))
        equation, x, weight = args
        inputs, output = equation.replace(" ", "").split("->")
        letter = inputs.split(",")[1][self._dims[id(weight)]]
        read, made = letter in inputs.split(",")[0], letter in output
        product = function(equation, x if read else copy_to_tp(x, self._mesh), weight)
        return product if made else reduce_from_tp(product, self._mesh)
