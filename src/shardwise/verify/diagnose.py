"""What would explain a difference: faults of sharded models, each tried on the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import permutations

import torch
from torch import Tensor

from shardwise.collectives import even_sizes
from shardwise.verify.arrange import CutFeatures, CutParameter
from shardwise.verify.locate import Difference
from shardwise.verify.result import Hypothesis

_MOST_PERMUTED = 4


def hypotheses(found: Difference, size: int, bias: Tensor | None = None) -> list[Hypothesis]:
    """Each fault that could be there, with the error that is left if it is taken back: the smallest first.

    Args:
        found: where the ranks differ from one process.
        size: ranks on the tp axis.
        bias: of the module, where it has one and the difference is in what it gives; (features,).
    """
    made = [one for make in (_sums, _parts, _permuted) for one in make(found, size)]
    made += _bias(found, size, bias)
    return ranked(made)


def ranked(made: Iterable[Hypothesis]) -> list[Hypothesis]:
    """Those that fit first, in the order in which they were made; then by what is left of the error."""
    return sorted(made, key=lambda one: (not one.fits, 0.0 if one.fits else one.remaining))


def tried(found: Difference, name: str, means: str, values: Sequence[Tensor]) -> Hypothesis:
    """The hypothesis under which each of `values` ought to be right."""
    remaining = max((found.error_of(value) for value in values), default=math.inf)
    return Hypothesis(name, means, remaining, remaining <= found.bound)


def _sums(found: Difference, size: int) -> Iterator[Hypothesis]:
    wholes = found.arrangement.whole(found.values, found.expected)
    same = [value for value in found.values[:size] if value.shape == found.expected.shape]
    # Ranks that have the same value have no parts of a sum, whatever they add up to.
    if len(same) == size and not _is_cut(found) and not all(torch.equal(value, same[0]) for value in same):
        total = torch.stack(same).sum(0)
        if found.backward:
            yield tried(
                found,
                "a missing gradient sum over the ranks",
                f"the {size} ranks' gradients add up to the right one; nobody adds them",
                [total],
            )
        else:
            yield tried(found, "a missing sum over the ranks", f"the {size} ranks' values add up to the right one", [total])
    yield tried(
        found,
        f"a sum made once too often (x {size})",
        f"every rank has {size} times the right value",
        [whole / size for whole in wholes],
    )
    yield tried(
        found, "a mean instead of a sum", f"every rank has 1/{size} of the right value", [whole * size for whole in wholes]
    )


def _parts(found: Difference, size: int) -> Iterator[Hypothesis]:
    values, expected = found.values[:size], found.expected
    if _is_cut(found):
        yield tried(found, "whole where a part is expected", "every rank has all of it: nobody cut it (colwise)", list(values))
        return
    short = [value for value in values if value.dim() == expected.dim() and value.shape[:-1] == expected.shape[:-1]]
    if len(short) == size and values[0].dim() and sum(value.shape[-1] for value in short) == expected.shape[-1]:
        yield tried(
            found,
            "a part where all of it is expected",
            "the ranks' values, side by side, are right: gather them, or take them rowwise",
            [torch.cat(list(values), -1)],
        )


def _permuted(found: Difference, size: int) -> Iterator[Hypothesis]:
    wholes = found.arrangement.whole(found.values, found.expected)
    if any(whole.shape != found.expected.shape for whole in wholes) or not found.expected.dim():
        return
    best: tuple[float, str] | None = None
    for words, change in _reorderings(size):
        for dim in {found.expected.dim() - 1, 0} if isinstance(found.arrangement, CutParameter) else {found.expected.dim() - 1}:
            changed = [change(whole.movedim(dim, -1)) for whole in wholes]
            if any(one is None for one in changed):
                continue
            left = max(found.error_of(one.movedim(-1, dim)) for one in changed if one is not None)
            best = min(best, (left, words)) if best is not None else (left, words)
    if best is not None:
        yield Hypothesis("a permuted shard", f"another order: {best[1]}", best[0], best[0] <= found.bound)


def _reorderings(size: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor | None]]]:
    """Ways back from another order of the last dim."""
    orders = permutations(range(size)) if size <= _MOST_PERMUTED else [tuple(reversed(range(size)))]
    for order in orders:
        if list(order) != list(range(size)):
            words = f"the ranks' parts stand in the order {', '.join(map(str, order))}"
            yield words, partial(_in_order, order=order)
    yield "the ranks' elements are interleaved", partial(_transposed, rows=size)
    yield "what is interleaved stands rank by rank", partial(_ranks_together, size=size)
    for blocks in (2, 3):
        words = f"{blocks} fused matrices are cut straight through"
        yield words, partial(_regrouped, size=size, blocks=blocks)


def _in_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """`x`, whose parts stand in this `order`, with them in that of the ranks."""
    sizes = even_sizes(x.shape[-1], len(order))
    parts = x.split([sizes[rank] for rank in order], -1)
    return torch.cat([parts[order.index(rank)] for rank in range(len(order))], -1)


def _transposed(x: Tensor, rows: int) -> Tensor | None:
    if not rows or x.shape[-1] % rows:
        return None
    found: Tensor = x.unflatten(-1, (-1, rows)).transpose(-1, -2).flatten(-2)
    return found


def _ranks_together(x: Tensor, size: int) -> Tensor | None:
    return _transposed(x, x.shape[-1] // size)


def _regrouped(x: Tensor, size: int, blocks: int) -> Tensor | None:
    if x.shape[-1] % (size * blocks):
        return None
    found: Tensor = x.unflatten(-1, (size, blocks, -1)).transpose(-2, -3).flatten(-3)
    return found


def _bias(found: Difference, size: int, bias: Tensor | None) -> Iterator[Hypothesis]:
    if bias is None or found.key.kind != "output" or bias.shape != found.expected.shape[-1:]:
        return
    wholes = found.arrangement.whole(found.values, found.expected)
    if any(whole.shape != found.expected.shape for whole in wholes):
        return
    yield tried(
        found,
        "a bias added by every rank",
        f"the difference is {size - 1} x bias: it is {size} times in the sum",
        [whole - (size - 1) * bias for whole in wholes],
    )
    yield tried(found, "a bias that is missing", "the difference is -1 x bias", [whole + bias for whole in wholes])


def _is_cut(found: Difference) -> bool:
    return isinstance(found.arrangement, CutFeatures) or (
        isinstance(found.arrangement, CutParameter) and found.arrangement.row.sharded
    )
