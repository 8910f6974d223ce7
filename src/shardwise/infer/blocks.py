"""Islands among products whose inputs were asked in blocks, or some of them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shardwise.infer.islands import Island, Owners, falls_apart, find_islands, together
from shardwise.infer.products import Product
from shardwise.infer.sampled import EVERY, NONE, Codes, Reads


def islands_of(reads: Sequence[Reads], in_blocks: Callable[[Product], Reads], size: int = 1) -> Iterator[Island]:
    """The islands of a model, given what each of its products reads.

    Args:
        in_blocks: asks what a product reads again, all of its inputs, in blocks of some.
        size: ranks, of which each is to have a component.
    """
    for group in together(reads):
        coded = [one.codes for one in group if one.codes is not None]
        numbers = _agreed(coded) if len(coded) == len(group) else None
        if numbers is not None:
            few = _asked_alone(group, coded[0].asked, numbers)
            found = _among_many(group, coded, few, numbers)
            if found is not None:
                yield found
            if found is not None or not falls_apart(few):  # nor does all of it
                continue
        group = [in_blocks(one.product) if one.codes is not None else one for one in group]
        for island in find_islands(group, size):
            units = {one.product: one.unit for one in group}
            yield replace(
                island,
                consumers={
                    product: tuple(owner for owner in owners for _ in range(units[product]))
                    for product, owners in island.consumers.items()
                },
            )


def _asked_alone(group: Sequence[Reads], asked: Tensor, numbers: Mapping[Product, Tensor]) -> list[Reads]:
    """What the blocks read that were asked one by one: of outputs, those that one of these touches, or all blocks do."""
    kept = _touched(numbers, asked)
    return [Reads(one.product, {p: touched[:, kept[p]] for p, touched in one.outputs.items()}, {}, one.unit) for one in group]


def _touched(numbers: Mapping[Product, Tensor], asked: Tensor) -> dict[Product, Tensor]:
    """Whether one of the blocks that were `asked` touches each output, or all blocks do."""
    return {product: torch.isin(number, asked) | (number == EVERY) for product, number in numbers.items()}


def _among_many(
    group: Sequence[Reads], codes: Sequence[Codes], few: Sequence[Reads], numbers: Mapping[Product, Tensor]
) -> Island | None:
    """The island of products with as many blocks each, of which each is a component: found for the `few` blocks that were
    asked, and then for all. None where it is not so.
    """
    asked, count = codes[0].asked, codes[0].count
    found = list(find_islands(few))
    each = tuple(range(len(asked)))
    if len(found) != 1 or any(owners != each for owners in found[0].consumers.values()):
        return None
    kept = _touched(numbers, asked)
    if any(found[0].producers[p] != _places(number[kept[p]], asked) for p, number in numbers.items()):
        return None
    others = _others(codes)
    if others is None:
        return None
    units = {one.product: one.unit for one in group}
    consumers = {product: tuple(torch.arange(count).repeat_interleave(unit).tolist()) for product, unit in units.items()}
    producers = {p: tuple(number.where(number >= 0, EVERY).tolist()) for p, number in numbers.items()}
    return Island(count, consumers, producers, *others)


def _agreed(codes: Sequence[Codes]) -> dict[Product, Tensor] | None:
    """The number of the block that touches each output, of all products together; None where they don't agree."""
    if len({one.count for one in codes}) > 1:
        return None
    numbers: dict[Product, Tensor] = {}
    for one in codes:
        for product, new in one.outputs.items():
            known = numbers.setdefault(product, new)
            if bool(((known != new) & (known != NONE) & (new != NONE)).any()):
                return None
            numbers[product] = torch.where(known == NONE, new, known)
    return numbers


def _places(numbers: Tensor, asked: Tensor) -> Owners:
    """Each number's place among those that were `asked`."""
    return tuple(torch.where(numbers == EVERY, EVERY, torch.searchsorted(asked, numbers)).tolist())


def _others(codes: Sequence[Codes]) -> tuple[dict[str, tuple[int, Owners]], tuple[str, ...]] | None:
    """The parameters that are in no product: which are sliced, and which are read whole. None where neither fits."""
    sliced: dict[str, tuple[int, Owners]] = {}
    shared: list[str] = []
    for name, number in ((name, number) for one in codes for name, number in one.parameters.items()):
        if bool((number < 0).all()):
            shared.append(name)
            continue
        along = _along(number)
        if along is None or sliced.setdefault(name, along) != along:
            return None
    return sliced, tuple(name for name in dict.fromkeys(shared) if name not in sliced)


def _along(number: Tensor) -> tuple[int, Owners] | None:
    """The dim along which the blocks differ, and whose the indices are."""
    for dim in range(number.dim()):
        rows = number.movedim(dim, 0).reshape(number.shape[dim], -1)
        if bool((rows == rows[:, :1]).all()) and bool((rows >= 0).all()):
            return dim, tuple(rows[:, 0].tolist())
    return None
