"""A forward pass cut at every product with a parameter: what comes out of each is a fresh leaf, so that autograd tells which
outputs of earlier products an input of a later one depends on.

No names and no rules per operator: whatever a module computes between two products is seen through its derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


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


_DEVICE = Tensor.device.__get__


class Products(TorchFunctionMode):
    """Sees the products with a model's parameters. A weight on meta has no values: whatever comes out of a product with it is
    made up.

    Args:
        parameters: those of the model, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._parameters = parameters
        self._generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = _KNOWN.get(function)
        if operands is not None:
            x, weight = (_argument(args, kwargs, where) for where in (operands.x, operands.weight))
            if isinstance(x, Tensor) and isinstance(weight, Tensor) and (found := self._product(weight, operands)) is not None:
                return self._seen(Use(*found, x, weight, function, args, kwargs))
        if function == _DEVICE and args[0].is_meta:
            return torch.device("cpu")  # where code that asks wants to put what it makes
        weight = next((name for given in tensors((args, kwargs)) if given.is_meta and (name := self._name(given))), None)
        if weight is None:
            return function(*args, **kwargs)
        return self._without_values(weight, function, args, kwargs)

    def _seen(self, use: Use) -> Any:
        """What a product gives to the code that runs."""
        return use.result()

    def _without_values(self, weight: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """What `function` gives for a weight on meta: views of it, its shape. Raises `ValuesNeeded` for what is computed."""
        needed = ValuesNeeded(weight, getattr(function, "__name__", str(function)))
        try:
            result = function(*args, **kwargs)
        except RuntimeError as error:
            if all(given.is_meta for given in tensors((args, kwargs))):
                raise
            raise needed from error
        if any(self._name(made) is None for made in tensors(result)):
            raise needed
        return result

    def _name(self, tensor: Tensor) -> str | None:
        """Of the parameter that `tensor` is, or is a view of."""
        return self._names.get(id(tensor)) or (None if tensor._base is None else self._names.get(id(tensor._base)))

    def _made_up(self, use: Use) -> Tensor:
        """Random numbers, as many as `use` has results."""
        return torch.randn(use.shape(), generator=self._generator)

    def _product(self, weight: Tensor, operands: _Operands) -> tuple[Product, int, int] | None:
        base = weight if id(weight) in self._names else weight._base
        if base is None or id(base) not in self._names or not base.is_contiguous():
            return None
        name, outputs = self._names[id(base)], _place(weight, base, operands.outputs)
        inputs = None if operands.inputs is None else _place(weight, base, operands.inputs)
        if outputs is None or (inputs is None and operands.inputs is not None):
            return None
        return Product(name, inputs and inputs[0], outputs[0]), inputs[1] if inputs else 0, outputs[1]


class ValuesNeeded(Exception):
    """A weight without values is used in another way than as a product: `name`, by the operator `used_by`."""

    def __init__(self, name: str, used_by: str) -> None:
        super().__init__(f"{name} is used by {used_by}, which is no product")
        self.name = name


@dataclass(frozen=True)
class Use:
    """A call of an operator that is a product."""

    product: Product
    first_input: int
    first_output: int
    x: Tensor
    weight: Tensor
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def result(self) -> Any:
        """What the operator gives."""
        return self.function(*self.args, **self.kwargs)

    def shape(self) -> torch.Size:
        """The shape of that, found without values."""
        if self.function is torch._grouped_mm:  # which knows bfloat16 alone, of tensors without values
            if self.x.shape[-1] != self.weight.shape[-2]:
                raise RuntimeError(f"{tuple(self.x.shape)} can't be multiplied with {tuple(self.weight.shape)}")
            return torch.Size((*self.x.shape[:-1], self.weight.shape[-1]))
        with torch.no_grad():
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (self.args, dict(self.kwargs)))
            shape: torch.Size = self.function(*args, **kwargs).shape
        return shape

    def bias(self) -> Tensor | None:
        """What is added to the product."""
        if self.function is functional.linear:
            found = _argument(self.args, self.kwargs, 2)
        else:
            found = self.args[0] if self.function is torch.addmm else None
        return found if isinstance(found, Tensor) else None


FEW = 16
"""Tokens up to which random signs may leave a feature without a positive value, or without a negative one."""


class Trace(Products):
    """Cuts the graph at every product of what runs under it, and records them as `calls`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self.calls: list[Call] = []

    def _seen(self, use: Use) -> Any:
        result = use.shape() if use.weight.is_meta else use.result()
        if isinstance(result, torch.Size):
            leaf = self._alternating(result).requires_grad_()
        elif isinstance(result, Tensor) and result.is_floating_point():
            leaf = self._perturbed(result.detach()).requires_grad_()
        else:
            return result
        self.calls.append(Call(use.product, use.x, leaf, use.first_input, use.first_output))
        return leaf.clone()  # which may be written to, where a leaf may not

    def _alternating(self, shape: torch.Size) -> Tensor:
        """Random numbers whose signs alternate."""
        return torch.randn(shape, generator=self._generator).abs() * self._signs(shape)

    def _signs(self, shape: torch.Size) -> Tensor:
        """Each feature's has one sign for half of the tokens and the other for the rest, so that a rectifier lets each through;
        of two products in a row not the same half, so that two of them that are multiplied do, too.
        """
        features = torch.randn(shape[-1], generator=self._generator).sign()
        turns = torch.arange(shape[:-1].numel()) // (1 + len(self.calls) % 2) % 2
        return features * (turns * 2 - 1).view(*shape[:-1], 1)

    def _perturbed(self, result: Tensor) -> Tensor:
        """`result` with other signs and some noise: a rectifier has no derivative where the tokens are all below zero."""
        noise = torch.randn(result.shape, generator=self._generator).to(result) * 0.1 * result.abs().mean().nan_to_num(0.0)
        if result[..., 0].numel() <= FEW:
            return (result.abs() + noise.abs()) * self._signs(result.shape).to(result)
        return result * torch.randn(result.shape, generator=self._generator).to(result).sign() + noise


def _argument(args: tuple[Any, ...], kwargs: Any, where: int) -> Any:
    if where < len(args):
        return args[where]
    values = list((kwargs or {}).values())
    return values[where - len(args)] if where - len(args) < len(values) else None


def tensors(value: object) -> Iterator[Tensor]:
    """Those in an operator's arguments, or in what a module returned; caches, which differ from rank to rank, are no part of
    it.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for inner in value.values() for tensor in tensors(inner))
    elif isinstance(value, list | tuple):
        yield from (tensor for inner in value for tensor in tensors(inner))


def _place(view: Tensor, base: Tensor, dim: int) -> tuple[int, int] | None:
    """Which dim of `base` the `dim` of its `view` runs over, and from which index on."""
    stride, offset = view.stride(dim), view.storage_offset() - base.storage_offset()
    for place, (length, step) in enumerate(zip(base.shape, base.stride(), strict=True)):
        if step == stride and length >= view.shape[dim] and length > 1:
            return place, offset // step % length
    return None
