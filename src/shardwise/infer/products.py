"""A forward pass cut at every product with a parameter: what comes out of each is a fresh leaf, so that autograd tells which
outputs of earlier products an input of a later one depends on.

No names and no rules per operator: whatever a module computes between two products is seen through its derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
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
    """

    weight: str
    inputs: int | None
    outputs: int
    input_fold: Fold = STRAIGHT
    output_fold: Fold = STRAIGHT


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


FEW = 16
"""Tokens up to which random signs may leave a feature without a positive value, or without a negative one."""


class Trace(Products):
    """Cuts the graph at every product of what runs under it, and records them: see `calls`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self._calls: list[Call] = []

    def _seen(self, use: Use) -> Any:
        result = use.shape() if use.weight.is_meta else use.result()
        if isinstance(result, torch.Size):
            leaf = self._alternating(result).requires_grad_()
        elif isinstance(result, Tensor) and result.is_floating_point():
            leaf = self._perturbed(result.detach()).requires_grad_()
        else:
            return result
        self._calls.append(Call(use.product, use.x, leaf, use.first_input, use.first_output))
        return leaf.clone()  # which may be written to, where a leaf may not

    def _einsum(self, call: EinsumCall) -> Tensor | None:
        letters, weight = call.letters, call.weight
        summed, made = letters.run(letters.summed), letters.run(letters.made)
        names = (letters.x, letters.weight, letters.output)
        if weight.is_meta or not (summed and made) or any(len(set(one)) < len(one) for one in names):
            return None
        around_x, around_y = _without(letters.x, summed), _without(letters.output, made)
        y = torch.einsum(f"{letters.output}->{around_y}{made}", call.result(call.x.detach()).detach())
        leaf = self._perturbed(y.flatten(len(around_y))).requires_grad_()
        x = torch.einsum(f"{letters.x}->{around_x}{summed}", call.x).flatten(len(around_x))
        lengths = dict(zip(letters.weight, weight.shape, strict=True))
        inner = [Fold(inner=prod(lengths[letter] for letter in side[1:])) for side in (summed, made)]
        product = Product(self._names[id(weight)], letters.weight.index(summed[0]), letters.weight.index(made[0]), *inner)
        self._calls.append(Call(product, x, leaf, 0, 0))
        as_made = leaf.clone().unflatten(-1, [lengths[letter] for letter in made])
        return torch.einsum(f"{around_y}{made}->{letters.output}", as_made)

    @property
    def calls(self) -> list[Call]:
        """The products, in the order of their calls; those that are used in equal pieces as one piece each."""
        uses: dict[Product, list[Call]] = {}
        for call in self._calls:
            uses.setdefault(call.product, []).append(call)
        inputs = {product: self._pieces(product.inputs, product, calls) for product, calls in uses.items()}
        counts = set(inputs.values()) - {1}
        outputs = {product: self._pieces(product.outputs, product, calls) for product, calls in uses.items() if counts}
        outputs = {product: pieces if pieces in counts else 1 for product, pieces in outputs.items()}
        return [_folded(call, inputs[call.product], outputs[call.product]) if counts else call for call in self._calls]

    def _pieces(self, dim: int | None, product: Product, calls: Sequence[Call]) -> int:
        """In how many equal pieces a product's parameter is used, along the dim of its inputs or outputs."""
        if dim is None:
            return 1
        inputs, length = dim == product.inputs, self._parameters[product.weight].shape[dim]
        uses = {(one.x.shape[-1], one.first_input) if inputs else (one.y.shape[-1], one.first_output) for one in calls}
        parts, firsts = {part for part, _ in uses}, {first for _, first in uses}
        part = parts.pop()
        uneven = parts or len(firsts) < 2 or length % part or any(first % part for first in firsts)
        return 1 if uneven else length // part

    def _alternating(self, shape: torch.Size) -> Tensor:
        """Random numbers whose signs alternate."""
        return torch.randn(shape, generator=self._generator).abs() * self._signs(shape)

    def _signs(self, shape: torch.Size) -> Tensor:
        """Each feature's has one sign for half of the tokens and the other for the rest, so that a rectifier lets each through;
        of two products in a row not the same half, so that two of them that are multiplied do, too.
        """
        features = torch.randn(shape[-1], generator=self._generator).sign()
        turns = torch.arange(shape[:-1].numel()) // (1 + len(self._calls) % 2) % 2
        return features * (turns * 2 - 1).view(*shape[:-1], 1)

    def _perturbed(self, result: Tensor) -> Tensor:
        """`result` with other signs and some noise: a rectifier has no derivative where the tokens are all below zero."""
        noise = torch.randn(result.shape, generator=self._generator).to(result) * 0.1 * result.abs().mean().nan_to_num(0.0)
        if result[..., 0].numel() <= FEW:
            return (result.abs() + noise.abs()) * self._signs(result.shape).to(result)
        return result * torch.randn(result.shape, generator=self._generator).to(result).sign() + noise


def _without(letters: str, some: str) -> str:
    return "".join(letter for letter in letters if letter not in some)


def _folded(call: Call, inputs: int, outputs: int) -> Call:
    """`call` of a product whose parameter is used in so many pieces, as one of these."""
    product, first_input, first_output = call.product, call.first_input, call.first_output
    if inputs > 1:
        product, first_input = replace(product, input_fold=Fold(inputs)), 0
    if outputs > 1:
        product, first_output = replace(product, output_fold=Fold(outputs)), 0
    return replace(call, product=product, first_input=first_input, first_output=first_output)


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
