"""A forward pass cut at every product with a parameter: what comes out of each is a fresh leaf, so that autograd tells which
outputs of earlier products an input of a later one depends on.

No names and no rules per operator: whatever a module computes between two products is seen through its derivative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.infer.products import Fold, Product, Products, Use
from shardwise.layers.operands import EinsumCall


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
        into, out = (Fold(inner=prod(lengths[letter] for letter in side[1:])) for side in (summed, made))
        product = Product(self._names[id(weight)], letters.weight.index(summed[0]), letters.weight.index(made[0]), into, out)
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
