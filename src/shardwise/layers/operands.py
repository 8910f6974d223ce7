"""The operators that multiply activations by a parameter: which of their arguments is which, and where in the parameter the
dims of a view of it lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Operands:
    """The arguments of an operator that is a product.

    Args:
        x: the place of the activations.
        weight: the place of the parameter.
        inputs: the dim of the parameter, from the last, that the activations' features run over; None of an embedding.
        outputs: the dim that the result's features run over.
    """

    x: int
    weight: int
    inputs: int | None
    outputs: int


_MATMUL = Operands(0, 1, -2, -1)
PRODUCTS: Mapping[object, Operands] = MappingProxyType(
    {
        functional.linear: Operands(0, 1, -1, -2),
        torch.addmm: Operands(1, 2, -2, -1),
        torch.matmul: _MATMUL,
        Tensor.matmul: _MATMUL,
        Tensor.__matmul__: _MATMUL,
        torch.mm: _MATMUL,
        Tensor.mm: _MATMUL,
        torch.bmm: _MATMUL,
        Tensor.bmm: _MATMUL,
        torch._grouped_mm: _MATMUL,
        functional.embedding: Operands(0, 1, None, -1),
    }
)


def argument(args: tuple[Any, ...], kwargs: Any, where: int) -> Any:
    """The argument at a place, however it was given; None where there is none."""
    if where < len(args):
        return args[where]
    values = list((kwargs or {}).values())
    return values[where - len(args)] if where - len(args) < len(values) else None


def with_argument(args: tuple[Any, ...], kwargs: Any, where: int, value: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with another one at a place."""
    if where < len(args):
        return (*args[:where], value, *args[where + 1 :]), dict(kwargs)
    return args, {**kwargs, list(kwargs)[where - len(args)]: value}


def place_of(view: Tensor, base: Tensor, dim: int) -> tuple[int, int] | None:
    """Which dim of `base` the `dim` of its `view` runs over, and from which index on; None where it runs over none."""
    stride, offset = view.stride(dim), view.storage_offset() - base.storage_offset()
    for place, (length, step) in enumerate(zip(base.shape, base.stride(), strict=True)):
        if step == stride and length >= view.shape[dim] and length > 1:
            return place, offset // step % length
    return None


@dataclass(frozen=True, slots=True)
class Einsum:
    """`torch.einsum` of activations and a parameter, by the letters of the dims of each.

    Args:
        x: of the activations.
        weight: of the parameter.
        output: of the result.
    """

    x: str
    weight: str
    output: str

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...], is_weight: Callable[[Tensor], bool]) -> EinsumCall | None:
        """A call of `torch.einsum` with two tensors, one of which `is_weight`; None of any other."""
        if function is not torch.einsum or not isinstance(args[0], str):
            return None
        given = list(args[1]) if len(args) == 2 and isinstance(args[1], list | tuple) else list(args[1:])
        equation = args[0].replace(" ", "")
        if len(given) != 2 or "->" not in equation or "." in equation or not all(isinstance(one, Tensor) for one in given):
            return None
        sides, output = equation.split("->")
        letters = sides.split(",")
        at = next((at for at in (1, 0) if is_weight(given[at])), None)
        return None if at is None else EinsumCall(cls(letters[1 - at], letters[at], output), given[1 - at], given[at], at)

    @property
    def summed(self) -> str:
        """Of the parameter, what is summed over."""
        return "".join(letter for letter in self.weight if letter in self.x and letter not in self.output)

    @property
    def made(self) -> str:
        """Of the parameter, what the result has and the activations have not."""
        return "".join(letter for letter in self.weight if letter in self.output and letter not in self.x)

    def run(self, letters: str) -> str:
        """Of some of the parameter's letters, the last ones that are neighbours in it."""
        found = ""
        for letter in reversed(self.weight):
            if letter in letters:
                found = letter + found
            elif found:
                break
        return found


@dataclass(frozen=True, slots=True)
class EinsumCall:
    """Such a product, with its operands, the parameter in place `at`."""

    letters: Einsum
    x: Tensor
    weight: Tensor
    at: int

    def result(self, x: Tensor) -> Tensor:
        """The product, of other activations."""
        names, given = [self.letters.x, self.letters.weight], [x, self.weight]
        if self.at == 0:
            names, given = names[::-1], given[::-1]
        found: Tensor = torch.einsum(f"{','.join(names)}->{self.letters.output}", *given)
        return found
