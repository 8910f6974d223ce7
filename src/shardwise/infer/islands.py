"""What can be computed apart: the heads of an attention, the KV groups, the channels of an MLP, found from who reads whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardwise.infer.products import Product
from shardwise.infer.sampled import Reads

Owners = tuple[int, ...]
"""Along one dim, which component each index belongs to; `EVERY` of those that all components need, `of_group(g)` of those that
the components of group `g` need."""

EVERY = -1
_FEW_CLASSES = 8


def of_group(group: Any) -> Any:
    """What stands for a group of components in place of a component's number; of an int or a tensor. It is its own inverse."""
    return EVERY - 1 - group


@dataclass(frozen=True)
class Island:
    """Products whose inputs or outputs fall into components that need nothing of each other.

    Args:
        count: how many components there are, alike in shape.
        consumers: the products that read the components, whose inputs are dealt.
        producers: the products whose outputs the components are computed from.
        sliced: parameters that are in no product of which each component has a part: the dim and the owners along it.
        shared: those that every component reads whole.
        groups: into how many groups components fall that share some outputs, or parameters' parts: KV heads of which several
            query heads read each; 0 where they share nothing, or the same with all.
    """

    count: int
    consumers: Mapping[Product, Owners]
    producers: Mapping[Product, Owners]
    sliced: Mapping[str, tuple[int, Owners]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    groups: int = 0

    @property
    def products(self) -> tuple[Product, ...]:
        """All of them."""
        return (*self.producers, *self.consumers)


def find_islands(reads: Sequence[Reads], size: int = 1) -> Iterator[Island]:
    """The islands of a model, given what each of its products reads; those that share a product are not separated here.

    An island of fewer components than `size` is one of the parts of these, if they fall apart but for what they share.
    """
    for group in together(reads):
        island = _island(group, size)
        if island is not None:
            yield island


def together(reads: Sequence[Reads]) -> list[list[Reads]]:
    """Readers that depend on outputs of the same product must be dealt alike."""
    groups: list[list[Reads]] = []
    for one in reads:
        touching = [group for group in groups if any(one.outputs.keys() & other.outputs.keys() for other in group)]
        merged = [*(read for group in touching for read in group), one]
        groups = [group for group in groups if group not in touching] + [merged]
    return groups


def _island(group: list[Reads], size: int) -> Island | None:
    products, widths, matrix, kinds = _table(group)
    parts = _components(matrix, kinds)
    if parts is None:
        return None
    rows, columns = parts
    count, groups = int(rows.max()) + 1, 0
    if count < size and (finer := _finer(matrix, kinds, rows, columns, size)) is not None:
        groups, (rows, columns) = count, finer
        count = int(rows.max()) + 1
    lengths = [widths[product] for product in products]
    used = matrix.any(0).split(lengths)
    owned = [_filled(owners, read, count) for owners, read in zip(columns.split(lengths), used, strict=True)]
    producers = dict(zip(products, owned, strict=True))
    consumers = {
        reads.product: owners
        for reads, owners in zip(group, rows.split([next(iter(r.outputs.values())).shape[0] for r in group]), strict=True)
    }
    if not _alike(count, groups, [*consumers.values(), *producers.values()]):
        return None
    others = _others(group, rows, count, groups)
    if others is None:
        return None
    as_tuple = {product: tuple(owners.tolist()) for product, owners in {**producers, **consumers}.items()}
    return Island(
        count,
        {product: as_tuple[product] for product in consumers},
        {product: as_tuple[product] for product in producers},
        *others,
        groups,
    )


def falls_apart(reads: Sequence[Reads]) -> bool:
    """Whether what products read that depend on the same outputs belongs to several components."""
    _, _, matrix, kinds = _table(reads)
    return _components(matrix, kinds) is not None


def _table(group: Sequence[Reads]) -> tuple[list[Product], dict[Product, int], Tensor, Tensor]:
    """The products that a group reads, how many outputs each has, which input of the group depends on which of them, (inputs,
    outputs) bool, and of each output the number of its product.
    """
    products = list(dict.fromkeys(product for reads in group for product in reads.outputs))
    widths = {product: next(r.outputs[product].shape[1] for r in group if product in r.outputs) for product in products}
    matrix = torch.cat([torch.cat([_outputs(reads, p, widths[p]) for p in products], 1) for reads in group])
    kinds = torch.cat([torch.full((widths[product],), number) for number, product in enumerate(products)])
    return products, widths, matrix, kinds


def _outputs(reads: Reads, product: Product, width: int) -> Tensor:
    length = next(iter(reads.outputs.values())).shape[0]
    return reads.outputs.get(product, torch.zeros(length, width, dtype=torch.bool))


def _components(matrix: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor] | None:
    """The component of each row and column of `matrix` (rows, columns) bool, in the order of their first rows; `EVERY` for
    columns that are needed by all, or by none. None where there is one component alone.

    What all components need holds them together: columns that touch every row are taken out first, then, where that does
    not do, kinds of columns (of one product, touching as many rows), as few as possible.
    """
    first, place, counts = _distinct(matrix, kinds)
    matrix, kinds = matrix[:, first], kinds[first]
    support = matrix.sum(0)
    loose = (support > 0) & (support < matrix.shape[0])
    kinds = kinds * (matrix.shape[0] + 1) + support
    found = _parted(matrix, kinds, counts, loose)
    if found is None and matrix.shape[1] > 0:  # of one product, as many rows next to each other, and apart
        order = torch.arange(matrix.shape[0])[:, None]
        span = torch.where(matrix, order, 0).amax(0) - torch.where(matrix, order, matrix.shape[0]).amin(0)
        found = _parted(matrix, kinds * (matrix.shape[0] + 1) + span.clamp_min(0), counts, loose, _FEW_CLASSES)
    return found and (found[0], found[1][place])


def _distinct(matrix: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of columns that are of one kind and touch the same rows, the first; which of these stands for each; and for how many."""
    bits = np.packbits(matrix.numpy(), axis=0).T
    rows = np.concatenate([np.ascontiguousarray(kinds.numpy()[:, None]).view(np.uint8), bits], axis=1)
    keys = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1]))).ravel()
    _, first, place, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    return torch.from_numpy(first), torch.from_numpy(place), torch.from_numpy(counts)


def _parted(
    matrix: Tensor, kinds: Tensor, counts: Tensor, loose: Tensor, most: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """The same, where kinds of columns are told apart, of which there are not more than `most`."""
    classes = [(kinds == kind) & loose for kind in kinds[loose].unique()]
    if most is not None and len(classes) > most:
        return None
    classes.sort(key=lambda members: int(counts[members].sum()))
    for number in range(min(3, len(classes))):
        for taken in combinations(classes, number):
            kept = loose & ~torch.stack(taken).any(0) if taken else loose
            parts = _connected(matrix & kept)
            if parts is not None and all(_touch_all(matrix[:, members], parts) for members in taken):
                return parts, _column_owners(matrix & kept, parts)
    return None


def _finer(matrix: Tensor, kinds: Tensor, rows: Tensor, columns: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    """The components that those of `rows` and `columns` fall into when several ranks keep what they share, and their owners.
    None where `size` ranks can't be given as many each, or what they share does not hold one component of them together.
    """
    groups, new_rows, new_columns, counts = int(rows.max()) + 1, rows.clone(), columns.clone(), set()
    if size % groups:
        return None
    for group in range(groups):
        inside, own = rows == group, columns == group
        parts = _components(matrix[inside][:, own], kinds[own])
        if parts is None:
            return None
        count = int(parts[0].max()) + 1
        counts.add(count)
        new_rows[inside] = parts[0] + group * count
        new_columns[own] = torch.where(parts[1] == EVERY, of_group(group), parts[1] + group * count)
    return (new_rows, new_columns) if len(counts) == 1 and counts.pop() * groups % size == 0 else None


def _connected(matrix: Tensor) -> Tensor | None:
    """The component of each row; None where there is one alone, or rows that nothing is computed for."""
    rows = matrix.shape[0]
    if not bool(matrix.any(1).all()):
        return None
    labels = torch.arange(rows, dtype=torch.int32)
    matrix = matrix[:, matrix.sum(0) > 1]  # the others connect nothing
    while matrix.shape[1]:
        of_columns = torch.where(matrix, labels[:, None], rows).amin(0)
        new = torch.where(matrix, of_columns[None, :], rows).amin(1)
        if torch.equal(new, labels):
            break
        labels = new
    found, owners = labels.unique(return_inverse=True)
    return owners if len(found) > 1 else None


def _touch_all(columns: Tensor, owners: Tensor) -> bool:
    """Whether each column touches rows of every component."""
    count = int(owners.max()) + 1
    touched = torch.zeros(count, columns.shape[1], dtype=torch.long).index_add(0, owners, columns.long())
    return bool((touched > 0).all())


def _column_owners(matrix: Tensor, owners: Tensor) -> Tensor:
    first = matrix.int().argmax(0)
    return torch.where(matrix.any(0), owners[first], EVERY)


def _filled(owners: Tensor, used: Tensor, count: int) -> Tensor:
    """`owners`, with those of outputs that nothing read (buckets of distances longer than the sample) as in the only regular
    order that the others are in; as they are where there is none, or several.
    """
    if bool(used.all()) or not bool((owners[used] >= 0).all()):
        return owners
    orders = [
        torch.arange(count).repeat_interleave(len(owners) // (times * count)).repeat(times)
        for times in range(1, len(owners) // count + 1)
        if len(owners) % (times * count) == 0
    ]
    fitting = [order for order in orders if torch.equal(order[used], owners[used])]
    return fitting[0] if len(fitting) == 1 else owners


def _alike(count: int, groups: int, sides: Sequence[Tensor]) -> bool:
    """Whether every component has as many indices on each side, and every group."""
    tallies = [torch.bincount(owners[owners >= 0], minlength=count) for owners in sides]
    tallies += [torch.bincount(of_group(owners[owners < EVERY]), minlength=groups) for owners in sides if groups]
    return all(bool((tally == tally[0]).all()) for tally in tallies)


def _others(
    group: list[Reads], rows: Tensor, count: int, groups: int
) -> tuple[dict[str, tuple[int, Owners]], tuple[str, ...]] | None:
    """The parameters that are in no product: which are sliced, and which are read whole by all. None where neither fits."""
    sliced: dict[str, tuple[int, Owners]] = {}
    shared: list[str] = []
    start = 0
    touched: dict[str, Tensor] = {}
    for reads in group:
        length = next(iter(reads.outputs.values())).shape[0]
        owners = rows[start : start + length]
        start += length
        for name, mask in reads.parameters.items():
            by_part = torch.stack([mask[owners == part].any(0) for part in range(count)])
            touched[name] = touched[name] | by_part if name in touched else by_part
    for name, mask in touched.items():
        cut = _cut_of(mask, groups)
        if cut is not None:
            sliced[name] = cut
        else:
            shared.append(name)
    return sliced, tuple(shared)


def _cut_of(mask: Tensor, groups: int) -> tuple[int, Owners] | None:
    """The dim of a parameter, and the owners along it, whose indices each belong to one component, or one group of them;
    (components, *shape).
    """
    for dim in range(mask.dim() - 1):
        along = mask.movedim(dim + 1, 1).flatten(2).any(2) if mask.dim() > 2 else mask
        if bool((along.sum(0) == 1).all()):
            return dim, tuple(along.int().argmax(0).tolist())
        by_group = along.unflatten(0, (groups, -1)).any(1) if groups else along
        if bool((by_group.sum(0) == 1).all()):
            return dim, tuple(of_group(by_group.int().argmax(0)).tolist())
    return None
