"""How one tensor lies on the ranks: pure index arithmetic, no communication.

A layout cuts one dim of a tensor. That dim is a row of *blocks* (the matrices that are fused along it; usually one), each
block is a row of *units* (what may not be cut: an attention head, a gate/up pair), and each rank gets its units of every block:

    Sharded(0)                        a a a a a a            ->   rank 0: a a a      rank 1: a a a
    Sharded(0, unit=2), 3 units       aa bb cc               ->   rank 0: aa bb      rank 1: cc
    Packed(0, (4, 2, 2))  (q | k | v) Q Q Q Q K K V V        ->   rank 0: Q Q K V    rank 1: Q Q K V
    Sharded(0, spread="share")        K0 K1 on four ranks    ->   K0, K0, K1, K1
    Sharded(0, spread="pad")          a a a a a on two ranks ->   rank 0: a a a      rank 1: a a 0

Every layout is its own inverse's definition: `unshard([shard(x, r, n) for r in range(n)])` is `x`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Spread = Literal["split", "share", "whole", "pad"]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """One matrix along the cut dim.

    Args:
        length: indices along the full dim.
        unit: how many neighbouring indices belong together; a cut only falls between units.
        spread: `"split"`: each rank gets its own units, as evenly as can be, the first ranks one more where they don't divide.
            `"share"`: the same, but with fewer units than ranks each unit is kept by `size / units` neighbouring ranks.
            `"whole"`: every rank keeps all of it. `"pad"`: every rank gets equally many indices, the last ones zeros.
    """

    length: int
    unit: int = 1
    spread: Spread = "split"

    @property
    def units(self) -> int:
        """How many units the block has."""
        return self.length // self.unit

    def problem(self, size: int) -> str | None:
        """Why `size` ranks can't hold this block, in words; None where they can."""
        if self.length % self.unit:
            return f"{self.length} is not a multiple of {self.unit}"
        if self.spread == "split" and self.units < size:
            return f"{self.units} x {self.unit} cannot be split over tp={size}"
        if self.spread == "share" and self.units < size and size % self.units:
            return f"{self.units} x {self.unit} cannot be shared evenly by tp={size}"
        return None

    def bounds(self, rank: int, size: int) -> tuple[int, int]:
        """The half-open range of this block's indices that `rank` holds."""
        if self.spread == "whole":
            return 0, self.length
        if self.spread == "pad":
            local = self.local_length(rank, size)
            return min(rank * local, self.length), min((rank + 1) * local, self.length)
        if self.spread == "share" and self.units < size:
            first = rank * self.units // size
            return first * self.unit, (first + 1) * self.unit
        share, rest = divmod(self.units, size)
        first = rank * share + min(rank, rest)
        return first * self.unit, (first + share + (rank < rest)) * self.unit

    def local_length(self, rank: int, size: int) -> int:
        """Indices that `rank` allocates for this block, padding included."""
        if self.spread == "pad":
            return -(-self.units // size) * self.unit
        start, stop = self.bounds(rank, size)
        return stop - start

    def copies(self, size: int) -> int:
        """How many ranks hold each index."""
        if self.spread == "whole":
            return size
        return size // self.units if self.spread == "share" and self.units < size else 1

    def __str__(self) -> str:
        text = str(self.length) if self.unit == 1 else f"{self.units} x {self.unit}"
        return text if self.spread == "split" else f"{text} {_SPREAD_WORDS[self.spread]}"


_SPREAD_WORDS: dict[Spread, str] = {"share": "shared", "whole": "on every rank", "pad": "padded"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A range that a rank holds: where it lies in the full tensor, where in the local one, and on how many ranks."""

    full: slice
    local: slice
    copies: int


class Layout:
    """How a tensor of a given full shape lies on `size` ranks. Subclasses say which dim is cut, and into which blocks."""

    __slots__ = ()

    def cut(self, shape: Shape) -> tuple[int, tuple[Block, ...]] | None:
        """The cut dim (not negative) and the blocks along it; None where every rank keeps the tensor whole."""
        raise NotImplementedError

    def problem(self, shape: Shape, size: int) -> str | None:
        """Why a tensor of this full shape can't lie so on `size` ranks, in words; None where it can."""
        cut = self.cut(shape)
        if cut is None:
            return None
        dim, blocks = cut
        if sum(block.length for block in blocks) != shape[dim]:
            return f"blocks of {' + '.join(str(b.length) for b in blocks)} do not add up to {shape[dim]} (dim {dim})"
        return next((found for block in blocks if (found := block.problem(size))), None)

    def pieces(self, shape: Shape, rank: int, size: int) -> tuple[Piece, ...]:
        """The ranges along the cut dim that `rank` holds, in local order. Empty for a tensor that is kept whole."""
        cut = self.cut(shape)
        return tuple(_pieces(cut[1], rank, size)) if cut else ()

    def local_shape(self, shape: Shape, rank: int, size: int) -> Shape:
        """The shape of `rank`'s shard."""
        cut = self.cut(shape)
        if cut is None:
            return shape
        dim, blocks = cut
        return (*shape[:dim], local_lengths(blocks, size)[rank], *shape[dim + 1 :])

    def lengths(self, shape: Shape, size: int) -> tuple[int, ...]:
        """Each rank's length along the cut dim; empty for a tensor that is kept whole."""
        cut = self.cut(shape)
        return local_lengths(cut[1], size) if cut else ()

    def copies(self, shape: Shape, size: int) -> int:
        """On how many ranks the tensor's indices lie; the largest number where blocks differ."""
        cut = self.cut(shape)
        return max(block.copies(size) for block in cut[1]) if cut else size

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """`rank`'s shard of `full`: a new contiguous tensor of the same dtype and device."""
        cut = self.cut(tuple(full.shape))
        if cut is None:
            return full.clone(memory_format=torch.contiguous_format)
        local = full.new_zeros(self.local_shape(tuple(full.shape), rank, size))
        for piece in _pieces(cut[1], rank, size):
            _narrow(local, cut[0], piece.local).copy_(_narrow(full, cut[0], piece.full))
        return local

    def unshard(self, shards: Sequence[Tensor], shape: Shape) -> Tensor:
        """The full tensor of `shape` from the shards of all ranks, in rank order."""
        cut = self.cut(shape)
        if cut is None:
            return shards[0].clone(memory_format=torch.contiguous_format)
        full = shards[0].new_empty(shape)
        for rank, shard in enumerate(shards):
            for piece in _pieces(cut[1], rank, len(shards)):
                _narrow(full, cut[0], piece.full).copy_(_narrow(shard, cut[0], piece.local))
        return full


@dataclass(frozen=True, slots=True)
class Replicated(Layout):
    """Every rank keeps the tensor whole."""

    def cut(self, shape: Shape) -> None:
        return None

    def __str__(self) -> str:
        return "whole"


@dataclass(frozen=True, slots=True)
class Sharded(Layout):
    """One dim in contiguous pieces of whole units, the first ranks one more where they don't divide (see `Block`)."""

    dim: int
    unit: int = 1
    spread: Spread = "split"

    def cut(self, shape: Shape) -> tuple[int, tuple[Block, ...]]:
        dim = self.dim % len(shape)
        return dim, (Block(shape[dim], self.unit, self.spread),)

    def __str__(self) -> str:
        words = [f"dim {self.dim}"]
        if self.unit > 1:
            words.append(f"units of {self.unit}")
        if self.spread != "split":
            words.append(_SPREAD_WORDS[self.spread])
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Packed(Layout):
    """Several matrices fused along `dim`, each cut on its own, so that every rank gets its part of each.

        blocks (q, k, v) = (4, 2, 2), size = 2:      Q Q Q Q K K V V   ->   rank 0: Q Q K V    rank 1: Q Q K V

    Contiguous pieces would give rank 0 only queries. Used for fused qkv, gate/up pairs and stacked experts.
    """

    dim: int
    blocks: tuple[Block, ...] = field()

    def cut(self, shape: Shape) -> tuple[int, tuple[Block, ...]]:
        return self.dim % len(shape), self.blocks

    def __str__(self) -> str:
        return f"dim {self.dim}: {' | '.join(str(block) for block in self.blocks)}"


def local_numbers(value: int, count: int, size: int) -> tuple[int, ...]:
    """What each of `size` ranks has of a number that falls into `count` equal parts."""
    return tuple(value // count * length for length in local_lengths((Block(count),), size))


@lru_cache(maxsize=1024)  # every layer asks for the same few
def local_lengths(blocks: tuple[Block, ...], size: int) -> tuple[int, ...]:
    """What each of `size` ranks has of the `blocks` of a dim together."""
    return tuple(sum(block.local_length(rank, size) for block in blocks) for rank in range(size))


def _pieces(blocks: tuple[Block, ...], rank: int, size: int) -> Iterator[Piece]:
    full = local = 0
    for block in blocks:
        start, stop = block.bounds(rank, size)
        if stop > start:
            yield Piece(slice(full + start, full + stop), slice(local, local + stop - start), block.copies(size))
        full += block.length
        local += block.local_length(rank, size)


def _narrow(tensor: Tensor, dim: int, where: slice) -> Tensor:
    return tensor.narrow(dim, where.start, where.stop - where.start)
