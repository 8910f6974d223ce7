"""A model whose large weights have no values, run in one process and as ranks: what comes out of the products with them is
given, the same numbers in both.

A product needs no trial, as its cut is linear algebra: with the right slice of the inputs and of the weight a rank has the
right slice of the outputs, or the right addend. So of a product with a large weight each rank is given its part of numbers that
were made up once, and what it hands to the product is compared, and so is the gradient that comes back. Everything in between,
which is what a plan gets wrong, runs at its real sizes, without the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shardwise.infer.figures import apart, size
from shardwise.infer.products import Product, Products, Use
from shardwise.plan import Plan
from shardwise.spec import ShardSpec, sums_gradient

Side = Literal["outputs", "inputs", "batch", "rows", "none"]
"""What of a product is cut: a dim of its weight; "batch" the dim that it has in common with the inputs and the outputs, "rows"
that of the ids of an embedding."""


@dataclass
class Known:
    """What one process knows of one use of a product.

    Args:
        product: which one.
        x: what it was given; None of an embedding.
        y: what came out, without the bias, a leaf.
        weighed: numbers by which `x` is multiplied, and summed, for a gradient.
        first_input: where in the weight the features of `x` start.
        first_output: the same of `y`.
    """

    product: Product
    x: Tensor | None
    y: Tensor
    weighed: Tensor | None
    first_input: int
    first_output: int


class WithoutValues(Products):
    """Products with weights on meta: what comes out of them is given, by a process or a rank each in its way."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self._terms: list[Tensor] = []

    def loss(self) -> Tensor:
        """What makes gradients flow from the inputs of the products; of what several ranks have in parts, a part."""
        return sum(self._terms, torch.zeros(()))

    def _seen(self, use: Use) -> Any:
        return self._given(use) if use.weight.is_meta else use.result()

    def _given(self, use: Use) -> Tensor:
        raise NotImplementedError


class Given(WithoutValues):
    """One process: makes up what comes out of products with weights on meta, and keeps it as `known`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self.known: list[Known] = []

    def _given(self, use: Use) -> Tensor:
        y = self._made_up(use).requires_grad_(torch.is_grad_enabled())
        asks = use.product.inputs is not None and use.x.requires_grad
        weighed = torch.randn(use.x.shape, generator=self._generator) if asks else None
        if weighed is not None:
            self._terms.append((use.x * weighed).mean())
        x = None if use.product.inputs is None else use.x.detach().clone()
        self.known.append(Known(use.product, x, y, weighed, use.first_input, use.first_output))
        return with_bias(y, use)


def with_bias(y: Tensor, use: Use) -> Tensor:
    """What the code gets: the product, which it may write to, and the bias."""
    bias = use.bias()
    return y.clone() if bias is None else y + bias


@dataclass
class Met:
    """What a rank had of one use of a product.

    Args:
        known: what one process has of it.
        y: this rank's part, a leaf.
        side: what is cut.
        held: the indices that the rank holds along it, counted as in `known`.
        partial: the ranks' gradients of `y` are parts of a sum, if not slices.
    """

    known: Known
    y: Tensor
    side: Side
    held: Tensor | None
    partial: bool

    def gradient(self) -> Tensor:
        """Of `y`, at its place in zeros of the full shape."""
        mine = torch.zeros_like(self.y) if self.y.grad is None else self.y.grad
        if self.held is None or self.side in ("inputs", "rows"):
            return mine
        full = torch.zeros_like(self.known.y)
        return full.index_add_(-1 if self.side == "outputs" else 0, self.held, mine)


class UnlikeOneProcess(Exception):
    """A rank does not do what one process does."""


class Replay(WithoutValues):
    """A rank: gives it its part of what one process knows, and compares what it hands to the products.

    Args:
        parameters: the rank's, by name.
        known: of one process, in order.
        plan: by which the parameters are cut.
        rank: among those of the plan.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], known: Sequence[Known], plan: Plan, rank: int) -> None:
        super().__init__(parameters)
        self._plan, self._rank = plan, rank
        self._left: dict[str, list[Known]] = {}
        for one in reversed(known):
            self._left.setdefault(one.product.weight, []).append(one)
        self.met: list[Met] = []
        self.error, self.worst = 0.0, ""

    def left(self) -> list[str]:
        """The weights that one process used more often."""
        return [name for name, known in self._left.items() if known]

    def _given(self, use: Use) -> Tensor:
        name = use.product.weight
        if not self._left.get(name):
            raise UnlikeOneProcess(f"{name} is used more often than in one process")
        known, row = self._left[name].pop(), self._plan[name]
        side, held = self._held(row, known, use)
        partial = side in ("outputs", "batch", "rows") or (
            side == "none" and sums_gradient(row, self._plan.size, self._plan.size)
        )
        self._compare(use, known, side, held, partial)
        y = known.y.detach().clone()
        if held is not None and side in ("outputs", "batch"):
            y = y.index_select(-1 if side == "outputs" else 0, held)
        elif side == "inputs" and self._rank > 0:
            y = torch.zeros_like(y)
        if y.shape[-1] != (shape := use.shape())[-1] or y.numel() != shape.numel():
            raise UnlikeOneProcess(f"{name} gives {tuple(shape)}, where its part would be {tuple(y.shape)}")
        y.requires_grad_(torch.is_grad_enabled())
        self.met.append(Met(known, y, side, held, partial))
        return with_bias(y.view(shape), use)

    def _held(self, row: ShardSpec, known: Known, use: Use) -> tuple[Side, Tensor | None]:
        cut = row.layout.cut(row.shape)
        if cut is None:
            return "none", None
        dim, product = cut[0], known.product
        along = torch.arange(row.shape[dim]).view([-1 if at == dim else 1 for at in range(len(row.shape))])
        held = row.layout.shard(along, self._rank, self._plan.size).flatten()
        if dim == product.outputs:
            length = use.shape()[-1]
            return "outputs", held[use.first_output : use.first_output + length] - known.first_output
        if dim == product.inputs:
            return "inputs", held[use.first_input : use.first_input + use.x.shape[-1]] - known.first_input
        return ("rows", None) if product.inputs is None else ("batch", held)

    def _compare(self, use: Use, known: Known, side: Side, held: Tensor | None, partial: bool) -> None:
        if known.x is None:
            return
        dim = {"inputs": -1, "batch": 0}.get(side)
        expected, weighed = known.x, known.weighed
        if dim is not None and held is not None:
            expected = expected.index_select(dim, held)
            weighed = None if weighed is None else weighed.index_select(dim, held)
        if use.x.shape[-1] != expected.shape[-1] or use.x.numel() != expected.numel():
            raise UnlikeOneProcess(
                f"{known.product.weight} is given {tuple(use.x.shape)}, where its part is {tuple(expected.shape)}"
            )
        error = apart(use.x.detach(), expected.view_as(use.x), max(size(known.x), 1e-6))
        if error > self.error:
            self.error, self.worst = error, known.product.weight
        if weighed is not None and use.x.requires_grad and (side in ("inputs", "batch") or not partial or self._rank == 0):
            self._terms.append((use.x * weighed.view_as(use.x)).sum() / max(known.x.numel(), 1))
        elif use.x.requires_grad:
            self._terms.append((use.x * 0).sum())  # takes part in the collectives of the others
