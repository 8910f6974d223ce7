"""A forward pass cut at every product with a parameter: what comes out of each is a fresh leaf, so that autograd tells which
outputs of earlier products an input of a later one depends on.

No names and no rules per operator: whatever a module computes between two products is seen through its derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Product:
    """A parameter that activations are multiplied with.

    Args:
        weight: the parameter's name.
        inputs: the dim of it that the activations' features run over; None of an embedding.
        outputs: the dim that the result's features run over.
    """

    weight: str
    inputs: int | None
    outputs: int


@dataclass(frozen=True)
class Call:
    """One use of a product.

    Args:
        product: which one.
        x: what it was given, (..., features).
        y: what came out, (..., features), a leaf.
        first_input: where in the parameter the features of `x` start: of an expert's part of a stacked weight, say.
        first_output: the same of `y`.
    """

    product: Product
    x: Tensor
    y: Tensor
    first_input: int
    first_output: int


@dataclass(frozen=True)
class _Operands:
    x: int
    weight: int
    inputs: int | None
    outputs: int


_LINEAR, _MATMUL, _ADDMM, _EMBEDDING = (
    _Operands(0, 1, -1, -2),
    _Operands(0, 1, -2, -1),
    _Operands(1, 2, -2, -1),
    _Operands(0, 1, None, -1),
)
_KNOWN: Mapping[object, _Operands] = MappingProxyType(
    {
        functional.linear: _LINEAR,
        torch.addmm: _ADDMM,
        torch.matmul: _MATMUL,
        Tensor.matmul: _MATMUL,
        Tensor.__matmul__: _MATMUL,
        torch.mm: _MATMUL,
        Tensor.mm: _MATMUL,
        torch.bmm: _MATMUL,
        Tensor.bmm: _MATMUL,
        torch._grouped_mm: _MATMUL,
        functional.embedding: _EMBEDDING,
    }
)


class Trace(TorchFunctionMode):
    """Records the products of what runs under it.

    Args:
        parameters: those of the model, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        operands = _KNOWN.get(function)
        if operands is None or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        x, weight = (_argument(args, kwargs, where) for where in (operands.x, operands.weight))
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
            return result
        found = self._product(weight, operands)
        if found is None:
            return result
        product, first_input, first_output = found
        leaf = self._perturbed(result.detach()).requires_grad_()
        self.calls.append(Call(product, x, leaf, first_input, first_output))
        return leaf.clone()  # which may be written to, where a leaf may not

    def _perturbed(self, result: Tensor) -> Tensor:
        """`result` with random signs and some noise: a rectifier has no derivative where the tokens are all below zero."""
        signs, noise = (torch.randn(result.shape, generator=self._generator).to(result) for _ in range(2))
        return result * signs.sign() + noise * 0.1 * result.detach().abs().mean().nan_to_num(0.0)

    def _product(self, weight: Tensor, operands: _Operands) -> tuple[Product, int, int] | None:
        base = weight if id(weight) in self._names else weight._base
        if base is None or id(base) not in self._names or not base.is_contiguous():
            return None
        name, outputs = self._names[id(base)], _place(weight, base, operands.outputs)
        inputs = None if operands.inputs is None else _place(weight, base, operands.inputs)
        if outputs is None or (inputs is None and operands.inputs is not None):
            return None
        return Product(name, inputs and inputs[0], outputs[0]), inputs[1] if inputs else 0, outputs[1]


def _argument(args: tuple[Any, ...], kwargs: Any, where: int) -> Any:
    if where < len(args):
        return args[where]
    values = list((kwargs or {}).values())
    return values[where - len(args)] if where - len(args) < len(values) else None


def _place(view: Tensor, base: Tensor, dim: int) -> tuple[int, int] | None:
    """Which dim of `base` the `dim` of its `view` runs over, and from which index on."""
    stride, offset = view.stride(dim), view.storage_offset() - base.storage_offset()
    for place, (length, step) in enumerate(zip(base.shape, base.stride(), strict=True)):
        if step == stride and length >= view.shape[dim] and length > 1:
            return place, offset // step % length
    return None
