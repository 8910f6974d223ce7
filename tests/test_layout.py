"""Layouts as properties: whatever the shape, the blocks and the number of ranks, shards are right and give the tensor back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardwise.layout import Block, Layout, Packed, Replicated, Sharded

SPREADS = ("split", "share", "whole", "pad")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool)
SIZES = st.integers(1, 6)


@st.composite
def _blocks(draw: st.DrawFn) -> Block:
    unit = draw(st.integers(1, 4))
    return Block(unit * draw(st.integers(1, 8)), unit, draw(st.sampled_from(SPREADS)))


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...], int]:
    """A layout, a full shape and a number of ranks; not always ones that go together (see `problem`)."""
    others = draw(st.lists(st.integers(1, 3), max_size=2))
    dim = draw(st.integers(0, len(others)))
    named = draw(st.sampled_from((dim, dim - len(others) - 1)))  # the same dim, counted from either end
    kind = draw(st.sampled_from(("replicated", "sharded", "packed")))
    blocks = tuple(draw(st.lists(_blocks(), min_size=1, max_size=1 if kind == "sharded" else 4)))
    layouts: dict[str, Layout] = {
        "replicated": Replicated(),
        "sharded": Sharded(named, blocks[0].unit, blocks[0].spread),
        "packed": Packed(named, blocks),
    }
    others.insert(dim, sum(block.length for block in blocks))
    return layouts[kind], tuple(others), draw(SIZES)


def _possible(case: tuple[Layout, tuple[int, ...], int]) -> bool:
    layout, shape, size = case
    return layout.problem(shape, size) is None


CASES = _cases().filter(_possible)


def _numbered(shape: tuple[int, ...]) -> Tensor:
    """A tensor in which every value is another one, and none is zero."""
    return 1 + torch.arange(torch.Size(shape).numel()).reshape(shape)


def _random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern: NaNs with payloads, infinities, negative zeros."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _shards(layout: Layout, full: Tensor, size: int) -> list[Tensor]:
    return [layout.shard(full, rank, size) for rank in range(size)]


@given(case=CASES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_unshard_gives_the_tensor_back_bit_for_bit(case, dtype, seed):
    """Guards: indices lost, doubled or permuted (fused weights sliced straight), and values put through arithmetic."""
    layout, shape, size = case
    full = _random_bits(shape, dtype, seed)
    assert _same_bits(layout.unshard(_shards(layout, full, size), shape), full)


@given(case=CASES)
def test_every_index_lies_on_as_many_ranks_as_declared(case):
    """Guards: a piece that two ranks hold unannounced (its gradient and its norm would count twice), or that none holds."""
    layout, shape, size = case
    cut = layout.cut(shape)
    if cut is None:
        assert layout.copies(shape, size) == size
        return
    held, declared = torch.zeros(shape[cut[0]], dtype=torch.int64), torch.zeros(shape[cut[0]], dtype=torch.int64)
    for rank in range(size):
        for piece in layout.pieces(shape, rank, size):
            held[piece.full] += 1
            declared[piece.full] = piece.copies
    assert torch.equal(held, declared)
    assert held.min() >= 1
    assert held.max() == layout.copies(shape, size)


@given(case=CASES)
def test_shards_hold_what_the_pieces_say_and_zeros_elsewhere(case):
    """Guards: loading (which reads by `pieces`) and sharding in memory that disagree, and padding that is not zero."""
    layout, shape, size = case
    full = _numbered(shape)
    cut = layout.cut(shape)
    for rank, shard in enumerate(_shards(layout, full, size)):
        assert tuple(shard.shape) == layout.local_shape(shape, rank, size)
        assert shard.is_contiguous()
        assert shard.data_ptr() != full.data_ptr()
        if cut is None:
            assert torch.equal(shard, full)
            continue
        rest = shard.clone()
        for piece in layout.pieces(shape, rank, size):
            local, there = rest.movedim(cut[0], 0)[piece.local], full.movedim(cut[0], 0)[piece.full]
            assert torch.equal(local, there)
            local.zero_()
        assert not rest.any()


@given(block=_blocks(), size=SIZES)
def test_ranks_are_balanced_and_in_order(block, size):
    """Guards: one rank with much more than the others, a cut inside a head, and ranks that hold each other's part."""
    layout, shape = Sharded(0, block.unit, block.spread), (block.length,)
    if layout.problem(shape, size):
        return
    lengths = [layout.local_shape(shape, rank, size)[0] for rank in range(size)]
    starts = [block.bounds(rank, size)[0] for rank in range(size)]
    assert max(lengths) - min(lengths) <= (block.unit if block.spread in ("split", "share") else 0)
    assert sorted(lengths, reverse=True) == lengths
    assert all(length % block.unit == 0 for length in lengths)
    assert sorted(starts) == starts


@given(block=_blocks(), size=SIZES, loose=st.integers(0, 3))
def test_problem_says_no_exactly_where_a_shard_would_be_wrong(block, size, loose):
    """Guards: sizes that are let through and lose indices, leave a rank empty or shared unevenly, and good ones refused."""
    block = Block(block.length + loose, block.unit, block.spread)
    layout, shape = Sharded(0, block.unit, block.spread), (block.length,)
    full = _numbered(shape)
    shards = _shards(layout, full, size)
    held = torch.cat(shards).bincount(minlength=block.length + 1)[1:]
    whole_units = block.length % block.unit == 0
    right = whole_units and held.min() >= 1 and held.min() == held.max()
    if block.spread in ("split", "share"):
        right = right and all(len(shard) for shard in shards)
    assert (layout.problem(shape, size) is None) == right


@given(blocks=st.lists(_blocks(), min_size=1, max_size=4), size=SIZES, off=st.integers(-3, 3))
def test_packed_asks_each_block_and_the_sum(blocks, size, off):
    """Guards: blocks that do not add up to the dim (a wrong head count in the config), which would shift every later block."""
    total = sum(block.length for block in blocks)
    problem = Packed(0, tuple(blocks)).problem((total + off, 2), size)
    assert (problem is None) == (off == 0 and not any(block.problem(size) for block in blocks))
    if off:
        assert str(total + off) in str(problem)


@pytest.mark.parametrize(
    ("layout", "length", "size", "expected"),
    [
        (Sharded(0), 6, 2, [[1, 2, 3], [4, 5, 6]]),
        (Sharded(0, unit=2), 6, 2, [[1, 2, 3, 4], [5, 6]]),
        (Packed(0, (Block(4), Block(2), Block(2))), 8, 2, [[1, 2, 5, 7], [3, 4, 6, 8]]),
        (Packed(0, (Block(4), Block(1, 1, "whole"))), 5, 2, [[1, 2, 5], [3, 4, 5]]),
        (Sharded(0, spread="share"), 2, 4, [[1], [1], [2], [2]]),
        (Sharded(0, unit=2, spread="share"), 4, 4, [[1, 2], [1, 2], [3, 4], [3, 4]]),
        (Sharded(0, spread="pad"), 5, 2, [[1, 2, 3], [4, 5, 0]]),
        (Packed(0, (Block(3, 1, "pad"), Block(2))), 5, 2, [[1, 2, 4], [3, 0, 5]]),
        (Sharded(0, spread="pad"), 3, 4, [[1], [2], [3], [0]]),
    ],
    ids=str,
)
def test_pictures_of_the_docstrings(layout, length, size, expected):
    """Guards: a layout that is consistent in itself, and another one than documented."""
    assert [shard.tolist() for shard in _shards(layout, _numbered((length,)), size)] == expected


def test_copies_of_mixed_blocks_is_the_largest():
    """Guards: a replicated part (multi-query k and v) counted like the sharded part beside it, so that it is never compared."""
    blocks = (Block(4), Block(2, 1, "share"), Block(1, 1, "whole"))
    assert [block.copies(4) for block in blocks] == [1, 2, 4]
    assert Packed(0, blocks).copies((7,), 4) == 4


def test_full_tensor_need_not_be_contiguous():
    """Guards: a transposed or sliced weight sharded by its storage instead of its indices."""
    full = _numbered((4, 6)).t()[::2]
    layout = Packed(1, (Block(2), Block(2)))
    shards = _shards(layout, full, 2)
    assert torch.equal(shards[0], full[:, [0, 2]])
    assert torch.equal(layout.unshard(shards, (3, 4)), full)
