"""What the inputs of a wide product depend on, without asking for each of them.

Layouts are regular, so neighbouring inputs belong together in blocks of one length. How long they are is seen from a few
samples. Where there are few blocks, each is asked as one. Where there are many (the channels of an MLP), some are asked, and of
all the others the numbers: for each bit of a block's number, all blocks that have it set together, and all that have not. An
output that is touched by one half alone, of every bit, belongs to one block, and the bits say to which. So nothing is taken for
granted: two blocks that read the same output differ in some bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.infer.products import Product

DENSE = 512
"""Inputs, or blocks of them, that are asked one by one."""
_FEW = 128
_SAMPLES = 32
EVERY, NONE, SEVERAL = -1, -2, -3
"""In place of a block's number: touched by all blocks that were asked, by none, by several and not by all."""


@dataclass(frozen=True)
class Codes:
    """Which block touches what.

    Args:
        count: how many blocks there are.
        asked: the numbers of those that were asked one by one.
        outputs: by product, the number of the block that touches each output, or `EVERY` or `NONE`.
        parameters: the same of each element of parameters that are in no product, by name.
    """

    count: int
    asked: Tensor
    outputs: Mapping[Product, Tensor]
    parameters: Mapping[str, Tensor]


@dataclass(frozen=True)
class Reads:
    """What the inputs of one product depend on.

    Args:
        product: the one that reads.
        outputs: by product, (inputs, outputs) bool: whether an input depends on an output.
        parameters: by name, (inputs, *shape) bool: whether an input depends on an element of a parameter that is in no
            product.
        unit: how many neighbouring inputs are one here.
        codes: where there are more inputs than those, which of them touches what.
    """

    product: Product
    outputs: Mapping[Product, Tensor]
    parameters: Mapping[str, Tensor]
    unit: int = 1
    codes: Codes | None = None


Ask = Callable[[Iterable[list[int]]], Reads]
"""What sums of inputs depend on."""


def read_sampled(ask: Ask, width: int) -> Reads:
    """What the `width` inputs of a product depend on."""
    unit = _unit(ask, width)
    if unit < width and width // unit > DENSE:
        found = _read_coded(ask, width, unit)
        if found is not None:
            return found
        unit = width
    return read_blocks(ask, width, unit)


def read_blocks(ask: Ask, width: int, unit: int | None = None) -> Reads:
    """The same in blocks that divide `unit`; where it is not known (or the width), in blocks of a power of two."""
    divisors = [part for part in range(1, width + 1) if width % part == 0]
    if unit is None or unit == width:
        divisors = [part for part in divisors if part & (part - 1) == 0] + divisors[-1:]
        size = next(part for part in divisors if width // part <= DENSE)
    else:
        size = next((part for part in divisors if unit % part == 0 and width // part <= _FEW), unit)
    found = ask([list(range(start, start + size)) for start in range(0, width, size)])
    return Reads(found.product, found.outputs, found.parameters, size)


def _unit(ask: Ask, width: int) -> int:
    """After how many inputs the first one's block ends: there the inputs lack more than a quarter of the first one's outputs,
    apart from those that all have (one head's features have all of its queries, and each another value; of the next head's
    outputs, the keys of a group may be the same). The width, where they never do.
    """
    lengths = [part for part in range(1, width) if width % part == 0]
    places = sorted({0, width - 1, *lengths, *(length - 1 for length in lengths)})
    found = ask([[place] for place in places])
    touched = torch.cat(list(found.outputs.values()), 1)
    own = touched[0] & ~touched.all(0)
    if not bool(own.any()):
        return width
    return next((length for length in lengths if (touched[places.index(length)] & own).sum() * 4 < own.sum() * 3), width)


def _read_coded(ask: Ask, width: int, unit: int) -> Reads | None:
    """None where some output is touched by several blocks, and not by all."""
    count = width // unit
    asked = torch.linspace(0, count - 1, _SAMPLES).long().unique()
    samples = ask([list(range(block * unit, (block + 1) * unit)) for block in asked.tolist()])
    numbers = torch.arange(width) // unit
    bits = range((count - 1).bit_length())
    halves = ask([(numbers >> bit & 1 == value).nonzero().flatten().tolist() for bit in bits for value in (0, 1)])
    outputs = {p: _numbers(halves.outputs[p], samples.outputs[p]) for p in samples.outputs}
    parameters = {name: _numbers(halves.parameters[name], samples.parameters[name]) for name in samples.parameters}
    if any(bool((code == SEVERAL).any()) for code in (*outputs.values(), *parameters.values())):
        return None
    codes = Codes(count, asked, outputs, parameters)
    return Reads(samples.product, samples.outputs, samples.parameters, unit, codes)


def _numbers(halves: Tensor, samples: Tensor) -> Tensor:
    """Which block touches what: (bits x 2, *shape) and (blocks asked, *shape) bool -> (*shape) int64."""
    without, with_bit = halves[0::2], halves[1::2]
    bits = torch.arange(len(with_bit)).view(-1, *[1] * (samples.dim() - 1))
    number = (with_bit.long() << bits).sum(0)
    found = torch.where((with_bit ^ without).all(0), number, SEVERAL)
    found = torch.where(samples.all(0), EVERY, found)
    return torch.where(halves.any(0), found, NONE)
