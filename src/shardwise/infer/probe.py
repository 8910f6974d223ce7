"""Which outputs of products, and which other parameters, each input of a product depends on."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardwise.infer.products import Product
from shardwise.infer.sampled import DENSE, Ask, Reads, read_blocks, read_sampled
from shardwise.infer.trace import Call
from shardwise.plan import wildcard

_AT_ONCE = 16
_ROOM = 2**25
"""Elements of gradients that are held at once."""


class Probe:
    """Asks autograd about the calls of one traced forward pass.

    Args:
        calls: the products, as they were called.
        parameters: all of the model, by name, and further tensors that code may read.
    """

    def __init__(self, calls: Sequence[Call], parameters: Mapping[str, Tensor]) -> None:
        self._calls = list(calls)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        used = {call.product.weight for call in calls}
        self._others = {name: p for name, p in parameters.items() if name not in used and p.requires_grad}
        self._generator = torch.Generator().manual_seed(0)
        self._known: dict[Hashable, Reads] = {}

    @property
    def consumers(self) -> list[Product]:
        """The products whose inputs depend on anything, in the order of their first call."""
        return list(dict.fromkeys(call.product for call in self._calls if _reads(call)))

    def reached(self, values: Sequence[Tensor]) -> set[Product]:
        """The products on whose outputs `values` depend."""
        values = [value for value in values if value.requires_grad]
        if not values or not self._calls:
            return set()
        leaves = [call.y for call in self._calls]
        cotangents = [torch.randn(value.shape, generator=self._generator).to(value) for value in values]
        found: Sequence[Tensor | None] = torch.autograd.grad(values, leaves, cotangents, retain_graph=True, allow_unused=True)
        return {call.product for call, gradient in zip(self._calls, found, strict=True) if gradient is not None}

    def inputs_of(self, product: Product) -> list[Tensor]:
        """What `product` was given, call by call."""
        return [call.x for call in self._calls if call.product == product and _reads(call)]

    def reads(self, product: Product) -> Reads | None:
        """What each input of `product` depends on; None where its first input depends on whatever any of them does, so that
        no output belongs to other inputs alone.
        """
        asked, width, sources = self._asked(product)
        ask = self._asking(asked, sources)
        first, whole = ask([[0]]), ask([list(range(width))])
        if all(bool((first.outputs[p] == whole.outputs[p]).all()) for p in whole.outputs):
            return None
        alike = self._alike(asked, sources)
        if alike not in self._known:
            few = width <= DENSE
            self._known[alike] = ask([[channel] for channel in range(width)]) if few else read_sampled(ask, width)
        return _renamed(self._known[alike], whole)

    def in_blocks(self, product: Product) -> Reads:
        """The same, in blocks of neighbouring inputs, of which there are not many."""
        asked, width, sources = self._asked(product)
        return read_blocks(self._asking(asked, sources), width)

    def _asked(self, product: Product) -> tuple[list[Call], int, _Sources]:
        assert product.inputs is not None
        asked = [call for call in self._calls if call.product == product and _reads(call)]
        width = product.input_fold.features(self._shapes[product.weight][product.inputs])
        everything = self._batch(asked, [list(range(width))])
        sources = _Sources(
            [call for call, gradient in zip(self._calls, everything[: len(self._calls)], strict=True) if gradient is not None],
            [name for name, g in zip(self._others, everything[len(self._calls) :], strict=True) if g is not None],
        )
        return asked, width, sources

    def _asking(self, asked: list[Call], sources: _Sources) -> Ask:
        room = sum(call.y.numel() for call in sources.calls) + sum(self._others[name].numel() for name in sources.parameters)
        room += sum(call.x.numel() for call in asked)
        at_once = max(1, min(_AT_ONCE, _ROOM // max(room, 1)))

        def ask(channels: Iterable[list[int]]) -> Reads:
            rows = list(channels)
            parts = [self._read(asked, sources, rows[start : start + at_once]) for start in range(0, len(rows), at_once)]
            outputs = {p: torch.cat([part.outputs[p] for part in parts]) for p in parts[0].outputs}
            names = parts[0].parameters
            return Reads(
                asked[0].product, outputs, {name: torch.cat([part.parameters[name] for part in parts]) for name in names}
            )

        return ask

    def _alike(self, asked: list[Call], sources: _Sources) -> Hashable:
        """The same for products of layers that are alike: one of them is asked for all. What differs all the same, the proof
        finds.
        """
        calls = [(wildcard(call.product.weight), call.x.shape, call.y.shape) for call in (*asked, *sources.calls)]
        order = [call.product for call in sources.calls]
        return (*calls, *map(order.index, order), *map(wildcard, sources.parameters))

    def _read(self, asked: list[Call], sources: _Sources, channels: list[list[int]]) -> Reads:
        inputs = [*(call.y for call in sources.calls), *(self._others[name] for name in sources.parameters)]
        found = self._gradients(asked, inputs, channels)
        outputs: dict[Product, Tensor] = {}
        for call, gradient in zip(sources.calls, found, strict=False):
            length = call.product.output_fold.features(self._shapes[call.product.weight][call.product.outputs])
            here = outputs.setdefault(call.product, torch.zeros(len(channels), length, dtype=torch.bool))
            touched = gradient.ne(0).reshape(len(channels), -1, gradient.shape[-1]).any(1)
            here[:, call.first_output : call.first_output + touched.shape[-1]] |= touched
        parameters = {
            name: gradient.ne(0) for name, gradient in zip(sources.parameters, found[len(sources.calls) :], strict=True)
        }
        return Reads(asked[0].product, outputs, parameters)

    def _batch(self, asked: list[Call], channels: list[list[int]]) -> list[Tensor | None]:
        inputs = [*(call.y for call in self._calls), *self._others.values()]
        xs = [call.x for call in asked]
        cotangents = [self._cotangent(call, channels)[0] for call in asked]
        return list(torch.autograd.grad(xs, inputs, cotangents, retain_graph=True, allow_unused=True))

    def _gradients(self, asked: list[Call], inputs: list[Tensor], channels: list[list[int]]) -> list[Tensor]:
        """The gradients of random sums of channels, (sums, *shape) for each of `inputs`."""
        xs = [call.x for call in asked]
        cotangents = [self._cotangent(call, channels) for call in asked]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operators that are batched one by one
            try:
                found = torch.autograd.grad(
                    xs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True, materialize_grads=True
                )
            except RuntimeError:  # an operator that can't be batched
                rows = [
                    torch.autograd.grad(
                        xs,
                        inputs,
                        [cotangent[row] for cotangent in cotangents],
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    for row in range(len(channels))
                ]
                found = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return list(found)

    def _cotangent(self, call: Call, channels: list[list[int]]) -> Tensor:
        made = torch.zeros(len(channels), *call.x.shape, dtype=call.x.dtype)
        *around, width = call.x.shape
        for row, group in enumerate(channels):
            here = [channel - call.first_input for channel in group if 0 <= channel - call.first_input < width]
            if here:
                made[row, ..., here] = torch.randn(*around, len(here), generator=self._generator).to(call.x.dtype)
        return made.to(call.x.device)


def _renamed(known: Reads, like: Reads) -> Reads:
    """What is `known` of one layer, for the products and parameters of another."""
    products = dict(zip(known.outputs, like.outputs, strict=True))
    names = dict(zip(known.parameters, like.parameters, strict=True))
    codes = known.codes and replace(
        known.codes,
        outputs={products[p]: code for p, code in known.codes.outputs.items()},
        parameters={names[name]: code for name, code in known.codes.parameters.items()},
    )
    outputs = {products[p]: touched for p, touched in known.outputs.items()}
    return Reads(like.product, outputs, {names[name]: mask for name, mask in known.parameters.items()}, known.unit, codes)


@dataclass(frozen=True)
class _Sources:
    calls: list[Call]
    parameters: list[str]


def _reads(call: Call) -> bool:
    return call.product.inputs is not None and call.x.requires_grad
