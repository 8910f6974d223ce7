"""The products with a model's parameters, as code that runs under a mode makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from shardwise.layers.operands import PRODUCTS, Einsum, EinsumCall, Operands, argument, place_of


@dataclass(frozen=True)
class Fold:
    """How features run over a dim of a parameter.

    Args:
        pieces: so many equal parts of the dim are used one at a time (experts below one another), each with all features.
        inner: so many neighbouring features are one index of the dim: those of further dims, which follow it.
    """

    pieces: int = 1
    inner: int = 1

    def features(self, length: int) -> int:
        """How many there are along a dim of `length`."""
        return length // self.pieces * self.inner


STRAIGHT = Fold()


@dataclass(frozen=True)
class Product:
    """A parameter that activations are multiplied with.

    Args:
        weight: the parameter's name.
        inputs: the dim of it that the activations' features run over; None of an embedding.
        outputs: the dim that the result's features run over.
        input_fold: how they do the first.
        output_fold: how they do the other.
        bias: the parameter that the same operator adds, of the length of all outputs.
    """

    weight: str
    inputs: int | None
    outputs: int
    input_fold: Fold = STRAIGHT
    output_fold: Fold = STRAIGHT
    bias: str | None = field(default=None, compare=False)


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
        einsum = Einsum.of(function, args, self._is_whole)
        if einsum is not None and (made := self._einsum(einsum)) is not None:
            return made
        operands = PRODUCTS.get(function)
        if operands is not None:
            x, weight = (argument(args, kwargs, where) for where in (operands.x, operands.weight))
            if isinstance(x, Tensor) and isinstance(weight, Tensor) and (found := self._product(weight, operands)) is not None:
                use = Use(*found, x, weight, function, args, kwargs)
                bias = self._names.get(id(use.bias()))
                return self._seen(replace(use, product=replace(use.product, bias=bias)) if bias is not None else use)
        if function == _DEVICE and args[0].is_meta:
            return torch.device("cpu")  # where code that asks wants to put what it makes
        weight = next((name for given in tensors((args, kwargs)) if given.is_meta and (name := self._name(given))), None)
        if weight is None:
            return function(*args, **kwargs)
        return self._without_values(weight, function, args, kwargs)

    def _seen(self, use: Use) -> Any:
        """What a product gives to the code that runs."""
        return use.result()

    def _einsum(self, call: EinsumCall) -> Tensor | None:
        """What an einsum with a parameter gives to the code that runs; None where nothing is to be done about it."""
        return None

    def _is_whole(self, tensor: Tensor) -> bool:
        return id(tensor) in self._names

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

    def _product(self, weight: Tensor, operands: Operands) -> tuple[Product, int, int] | None:
        base = weight if id(weight) in self._names else weight._base
        if weight.dim() < 2 and operands.inputs is not None:  # one output, which is no feature of what comes out
            return None
        if base is None or id(base) not in self._names or not base.is_contiguous():
            return None
        name, outputs = self._names[id(base)], place_of(weight, base, operands.outputs)
        inputs = None if operands.inputs is None else place_of(weight, base, operands.inputs)
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
            found = argument(self.args, self.kwargs, 2)
        else:
            found = self.args[0] if self.function is torch.addmm else None
        return found if isinstance(found, Tensor) else None


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
