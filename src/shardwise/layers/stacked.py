"""Products that no linear layer computes: with stacked matrices, and with bare parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from shardwise.collectives import copy_to_tp, reduce_from_tp
from shardwise.layers.base import Cut, ParallelStyle, is_parallel
from shardwise.layers.operands import PRODUCTS, Einsum, argument, place_of, with_argument
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


class BareProducts(LocalParamsParallel):
    """A module that multiplies by parameters of its own, which are cut: by `x @ weight`, views of it, or in einsum.

    A product whose results run over the cut dim is column-wise, one that sums over it row-wise.
    """

    prefix = "Products"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Products(self):
            return super().forward(*args, **kwargs)


class _Products(TorchFunctionMode):
    def __init__(self, module: ParallelStyle) -> None:
        super().__init__()
        self._mesh = module._tp.mesh
        self._cut: dict[int, tuple[Tensor, int]] = {}
        lists = [child for child in module.children() if isinstance(child, nn.ParameterList | nn.ParameterDict)]
        for one in (module, *lists):
            state: Any = one._tp if is_parallel(one) else None
            layouts = state.layouts if state is not None else {}
            for name, (layout, shape) in layouts.items():
                if (cut := layout.cut(shape)) is not None and (parameter := one._parameters.get(name)) is not None:
                    self._cut[id(parameter)] = parameter, cut[0]

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        einsum = Einsum.of(function, args, lambda tensor: id(tensor) in self._cut)
        if einsum is not None:
            letter = einsum.letters.weight[self._cut[id(einsum.weight)][1]]
            entered = copy_to_tp(einsum.x, self._mesh) if letter in einsum.letters.made else einsum.x
            return self._left(einsum.result(entered), letter in einsum.letters.summed)
        operands, kwargs = PRODUCTS.get(function), kwargs or {}
        if operands is None or operands.inputs is None:
            return function(*args, **kwargs)
        weight = argument(args, kwargs, operands.weight)
        known = self._cut.get(id(weight)) or self._cut.get(id(getattr(weight, "_base", None)))
        if known is None:
            return function(*args, **kwargs)
        base, dim = known
        if _runs_over(weight, operands.outputs, base, dim):
            x = argument(args, kwargs, operands.x)
            args, kwargs = with_argument(args, kwargs, operands.x, copy_to_tp(x, self._mesh))
            return function(*args, **kwargs)
        return self._rowwise(function, args, kwargs, _runs_over(weight, operands.inputs, base, dim))

    def _rowwise(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, summed: bool) -> Any:
        """A product without its bias, which is added once, after the sum."""
        if summed and function is torch.addmm:
            return self._left(torch.mm(argument(args, kwargs, 1), argument(args, kwargs, 2)), summed) + args[0]
        bias = argument(args, kwargs, 2) if function is linear else None
        if not summed or bias is None:
            return self._left(function(*args, **kwargs), summed)
        return self._left(linear(argument(args, kwargs, 0), argument(args, kwargs, 1)), summed) + bias

    def _left(self, product: Tensor, summed: bool) -> Tensor:
        return reduce_from_tp(product, self._mesh) if summed else product


def _runs_over(view: Tensor, dim: int, base: Tensor, of_base: int) -> bool:
    found = place_of(view, base, dim)
    return found is not None and found[0] == of_base
