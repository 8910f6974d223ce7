"""The backend "shm": every collective, dtype and size, on 1 to 4 ranks, against a result computed in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from shardwise.shm.channel import SLOT_BYTES
from shardwise.testing import RankPool
from shm_cases import DATA, SMALL_SLOT, Groups, moved, reduced, same, sizes

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def groups():
    """Groups of up to four ranks."""
    with RankPool(4, backend=None, start_method="forkserver") as pool:
        yield Groups(pool)


def _all_moved(counts: dict[torch.dtype, list[int]]) -> list[str]:
    return [text for dtype, each in counts.items() for count in each for text in moved(count, dtype)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_collective_moves_every_dtype_and_size(groups, size):
    """Guards: chunks that end at the wrong place, a slot written while it is still read, a dtype that cannot be copied."""
    counts = {dtype: [0, 1, 7, 1000] for dtype in DATA}
    counts |= {dtype: sizes(dtype.itemsize, SMALL_SLOT) for dtype in (torch.float32, torch.bool)}
    assert groups.run(size, _all_moved, counts, slot=SMALL_SLOT) == [[]] * size


def _all_reduced(cases: list[tuple[torch.dtype, str, int]]) -> list[str]:
    return [text for dtype, op, count in cases for text in reduced(count, dtype, op)]


_BITS = ("BAND", "BOR", "BXOR")


def _cases() -> list[tuple[torch.dtype, str, int]]:
    cases = [(torch.float32, "SUM", count) for count in sizes(4, SMALL_SLOT)]
    for dtype in DATA:
        real = not dtype.is_complex and dtype != torch.bool
        ops = ["SUM", *(["AVG", "MIN", "MAX"] if real else []), *([] if dtype.is_complex else ["PRODUCT"])]
        if dtype == torch.uint64:
            ops.remove("AVG")
        if not (dtype.is_floating_point or dtype.is_complex):
            ops += _BITS
        cases += [(dtype, op, count) for op in ops for count in (0, 1, 2000)]
    return cases


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_reduction_of_every_dtype_and_size(groups, size):
    """Guards: a reduction in the wrong type or order, an average not divided, a part of a chunk that nobody reduces."""
    assert groups.run(size, _all_reduced, _cases(), slot=SMALL_SLOT) == [[]] * size


def _sums(dtype: torch.dtype, count: int) -> torch.Tensor:
    torch.manual_seed(dist.get_rank())
    x = torch.randn(count).to(dtype)
    dist.all_reduce(x)
    return x


def test_the_borders_of_real_slots(groups):
    """Guards: what only goes wrong at the size that slots really have."""
    assert (
        groups.run(3, _all_reduced, [(torch.float32, "SUM", count) for count in (SLOT_BYTES // 4, SLOT_BYTES // 4 + 1)])
        == [[]] * 3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [300, 100_001])
def test_sums_have_the_same_bits_on_all_ranks_and_are_rounded_once(groups, dtype, count):
    """Guards: ranks that add in different orders, so that replicas drift apart; half precision rounded after every addition."""
    results = groups.run(3, _sums, dtype, count)
    assert all(same(result, results[0]) for result in results)
    total = torch.zeros(count)
    for rank in range(3):
        torch.manual_seed(rank)
        total += torch.randn(count).to(dtype).float()
    assert same(results[0], total.to(dtype))


def _strided() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.full((6, 8), float(rank + 1))[::2, 1::3].t()
    assert not x.is_contiguous()
    dist.all_reduce(x)
    assert torch.equal(x, torch.full_like(x, size * (size + 1) / 2))
    base = torch.zeros(4, 6)
    outputs = [base[:, column] for column in range(size)]
    dist.all_gather(outputs, torch.full((4, 2), float(rank + 1))[:, 0])
    assert base[0].tolist() == [1.0, 2.0, 3.0][:size] + [0.0] * (6 - size)
    sent = base.t()[1:3]
    dist.broadcast(sent, 0)
    assert base[:, 1].tolist() == [2.0] * 4
    y = torch.ones(3, 3, requires_grad=True)
    dist.all_reduce(y.t() if rank else y)
    assert y.tolist() == [[float(size)] * 3] * 3


def test_tensors_with_strides_are_read_and_written_in_place(groups):
    """Guards: the result written into a contiguous copy that nobody sees, and neighbours of a view overwritten."""
    groups.run(2, _strided)


def _uneven() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    sends = [rank + to for to in range(size)]
    source = torch.cat([torch.full((count, 3), 10 * rank + to) for to, count in enumerate(sends)])
    takes = [sender + rank for sender in range(size)]
    output = torch.empty(sum(takes), 3, dtype=source.dtype)
    dist.all_to_all_single(output, source, takes, sends)
    expected = [torch.full((count, 3), 10 * sender + rank) for sender, count in enumerate(takes)]
    assert torch.equal(output, torch.cat(expected))
    long = [200_000 * (to == 0) + 3 for to in range(size)]
    source = torch.arange(float(sum(long)))
    pieces = [torch.empty(long[rank]) for _ in range(size)]
    dist.all_to_all(pieces, list(source.split(long)))
    assert all(torch.equal(piece, source.split(long)[rank]) for piece in pieces)
    nothing = torch.empty(0)
    dist.all_to_all_single(nothing, torch.empty(0), [0] * size, [0] * size)


def test_uneven_and_empty_parts_travel_to_every_rank(groups):
    """Guards: the number of rounds taken from a rank's own parts, so that ranks with little to send leave too early."""
    groups.run(3, _uneven)


def _objects() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    found: list[object] = [None] * size
    dist.all_gather_object(found, {"rank": rank, "text": "x" * (rank * 1000)})
    assert found == [{"rank": other, "text": "x" * (other * 1000)} for other in range(size)]
    sent: list[object] = [{"a": 1}, "b"] if rank == 1 else [None, None]
    dist.broadcast_object_list(sent, 1)
    assert sent == [{"a": 1}, "b"]
    collected: list[object] | None = [None] * size if rank == 0 else None
    dist.gather_object(rank, collected, 0)
    assert collected == (list(range(size)) if rank == 0 else None)
    dist.barrier()


def test_objects_travel(groups):
    """Guards: a group of which c10d does not find out that its objects travel on the CPU."""
    groups.run(2, _objects)


def _handles() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = [torch.full((count,), rank + 1.0) for count in (3, 1_300_000, 5, 2_700_000)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    total = size * (size + 1) / 2
    assert works[2].wait()
    assert all(tensor.eq(total).all() for tensor in tensors[:3])
    last = torch.ones(2)
    dist.all_reduce(last)
    assert works[3].is_completed()
    assert tensors[3].eq(total).all()
    assert works[3].get_future().wait()[0] is tensors[3]


def test_handles_are_finished_in_order(groups):
    """Guards: a synchronous call that overtakes those begun before it, and reads their data as its own."""
    groups.run(2, _handles)


def _unwaited() -> tuple[float, float]:
    import time

    rank = dist.get_rank()
    x = torch.ones(1_500_000)
    if rank == 0:
        work = dist.all_reduce(x, async_op=True)
        deadline = time.monotonic() + 20
        while not work.is_completed() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert work.is_completed()
    else:
        future = dist.all_reduce(x, async_op=True).get_future()
        seen: list[torch.Tensor] = []
        after = future.then(lambda done: seen.append(done.value()[0]))
        future.wait()
        after.wait()  # the callback runs in the thread that completes the future, perhaps behind the wait above
        assert seen
        assert seen[0] is x
    return x.min().item(), x.max().item()


def test_what_nobody_waits_for_is_finished_all_the_same(groups):
    """Guards: a program that polls its handle, or waits for something else first, and hangs; futures (DDP) that never come."""
    assert groups.run(2, _unwaited) == [(2.0, 2.0)] * 2


def _inference() -> list[float]:
    with torch.inference_mode():
        x = torch.ones(3)
        dist.all_reduce(x)
        y = torch.ones(1_400_000)
        work = dist.all_reduce(y, async_op=True)
    work.wait()
    dist.all_reduce(x)
    z = torch.ones(3, requires_grad=True)
    dist.all_reduce(z)
    return [*x.tolist(), y.max().item(), *z.tolist()]


def test_inference_tensors_may_be_waited_for_outside_of_the_mode(groups):
    """Guards: views made in inference mode that later calls may not write, and the other way round."""
    assert groups.run(2, _inference) == [[4.0] * 3 + [2.0] + [2.0] * 3] * 2
