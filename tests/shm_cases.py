"""What the tests of the backend "shm" run on its ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from shardwise.shm import channel
from shardwise.testing import RankPool

R = TypeVar("R")

DATA = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def values(count: int, dtype: torch.dtype, rank: int, salt: int = 0) -> Tensor:
    """Small whole numbers, another sequence on each rank: every dtype holds them, and sums of them, exactly."""
    numbers = (torch.arange(count) * 7 + rank * 5 + salt * 3) % 4
    return numbers.to(torch.uint8).to(dtype) if dtype.itemsize == 1 and dtype.is_floating_point else numbers.to(dtype)


def same(first: Tensor, second: Tensor) -> bool:
    """Bit for bit; any dtype."""
    pairs = first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8)
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(*pairs)


SMALL_SLOT = 4096
"""Bytes of a slot in the tests that go through all cases: several chunks are then quickly computed."""


def as_group(turn: int, size: int, slot: int | None, fn: Callable[..., R], *args: object) -> R | None:
    """Call `fn(*args)` on the first `size` ranks, as a default process group of that size; nothing on the others.

    `turn`: another number for each call. `slot`: bytes of a slot, or None for the real ones.
    """
    store, rank, _ = next(rendezvous("env://"))
    if rank >= size:
        return None
    with pytest.MonkeyPatch.context() as patch:
        if slot is not None:
            patch.setattr(channel, "SLOT_BYTES", slot)
        dist.init_process_group("shm", store=dist.PrefixStore(str(turn), store), rank=rank, world_size=size)
        try:
            return fn(*args)
        finally:
            dist.destroy_process_group()


class Groups:
    """Processes that form one group after the other: a process takes longer to start than all its tests."""

    def __init__(self, pool: RankPool) -> None:
        self.pool = pool
        self._turn = 0

    def run(self, size: int, fn: Callable[..., R], *args: object, slot: int | None = None, timeout: float = 60.0) -> list[R]:
        """`fn(*args)` on a new group of `size`; the results in rank order."""
        self._turn += 1
        return self.pool.run(as_group, self._turn, size, slot, fn, *args, timeout=timeout)[:size]


def sizes(itemsize: int, slot_bytes: int, slots: int = 3) -> list[int]:
    """Numbers of elements around the borders of a slot."""
    slot = slot_bytes // itemsize
    return [0, 1, 7, slot - 1, slot, slot + 1, slots * slot + 5]


def moved(count: int, dtype: torch.dtype) -> list[str]:
    """Every collective that moves data, over tensors of this size; what came out wrong."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = values(count, dtype, rank)
    all_of_them = [values(count, dtype, other) for other in range(size)]
    wrong: list[str] = []

    def check(name: str, got: Tensor, expected: Tensor) -> None:
        if not same(got, expected):
            wrong.append(f"{name} of {count} x {dtype}")

    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(gathered, mine)
    check("all_gather", torch.stack(gathered), torch.stack(all_of_them))
    single = torch.empty(size * count, dtype=dtype)
    dist.distributed_c10d._get_default_group()._allgather_base(single, mine).wait()
    check("all_gather_into_tensor", single, torch.cat(all_of_them))
    root = size - 1
    sent = mine.clone()
    dist.broadcast(sent, root)
    check("broadcast", sent, all_of_them[root])
    outputs = [torch.empty_like(mine) for _ in range(size)] if rank == root else None
    dist.gather(mine, outputs, root)
    if outputs is not None:
        check("gather", torch.stack(outputs), torch.stack(all_of_them))
    taken = torch.empty_like(mine)
    dist.scatter(taken, [values(count, dtype, to, 1) for to in range(size)] if rank == root else None, root)
    check("scatter", taken, values(count, dtype, rank, 1))
    inputs = [values(count, dtype, rank, to) for to in range(size)]
    outputs = [torch.empty_like(mine) for _ in range(size)]
    dist.all_to_all(outputs, inputs)
    expected = torch.stack([values(count, dtype, other, rank) for other in range(size)])
    check("all_to_all", torch.stack(outputs), expected)
    flat = torch.empty(size * count, dtype=dtype)
    dist.all_to_all_single(flat, torch.cat(inputs))
    check("all_to_all_single", flat, expected.flatten())
    return wrong


def reduced(count: int, dtype: torch.dtype, op: str) -> list[str]:
    """Every collective that reduces, over tensors of this size; what came out wrong."""
    rank, size = dist.get_rank(), dist.get_world_size()
    kind = getattr(dist.ReduceOp, op)
    expected = plain_reduction([values(count, dtype, other) for other in range(size)], op)
    wrong: list[str] = []

    def check(name: str, got: Tensor, expected: Tensor) -> None:
        if not same(got, expected):
            wrong.append(f"{name} {op} of {count} x {dtype}")

    everywhere = values(count, dtype, rank)
    dist.all_reduce(everywhere, kind)
    check("all_reduce", everywhere, expected)
    there = values(count, dtype, rank)
    dist.reduce(there, size - 1, kind)
    check("reduce", there, expected if rank == size - 1 else values(count, dtype, rank))
    inputs = [values(count, dtype, rank, to) for to in range(size)]
    part = torch.empty(count, dtype=dtype)
    dist.reduce_scatter(part, inputs, kind)
    expected = plain_reduction([values(count, dtype, other, rank) for other in range(size)], op)
    check("reduce_scatter", part, expected)
    part = torch.empty(count, dtype=dtype)
    options = dist.ReduceScatterOptions()
    options.reduceOp = kind
    dist.distributed_c10d._get_default_group()._reduce_scatter_base(part, torch.cat(inputs), options).wait()
    check("reduce_scatter_tensor", part, expected)
    return wrong


def plain_reduction(tensors: list[Tensor], op: str) -> Tensor:
    """One after the other, computed in a type that holds everything."""
    dtype = tensors[0].dtype
    if dtype == torch.bool:
        stacked = torch.stack(tensors)
        if op == "BXOR":
            return stacked.sum(0) % 2 == 1
        return stacked.any(0) if op in ("SUM", "MAX", "BOR") else stacked.all(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    total = tensors[0].to(wide)
    for tensor in tensors[1:]:
        total = _PLAIN[op](total, tensor.to(wide))
    if op == "AVG":
        total = total / len(tensors) if wide != torch.int64 else total // len(tensors)
    return total.to(dtype)


_PLAIN = {
    "SUM": torch.add,
    "AVG": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}
