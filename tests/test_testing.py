"""`shardwise.testing`: what a rank returns arrives, and a rank that fails is named, with the reason, and soon."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from shardwise.errors import MismatchError
from shardwise.testing import RankError, RankPool, RankTimeoutError, run_ranks, run_threads


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total


def _all_collectives() -> dict[str, list[float]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    group = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",)).get_group("tp")
    pair = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))["tp"].get_group()
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    mine = torch.full((2,), float(rank))
    summed, in_pair, first = mine.clone(), mine.clone(), mine.clone()
    gathered, part, exchanged = torch.empty(2 * size), torch.empty(1), torch.empty(size)
    dist.all_reduce(summed, group=group)
    dist.all_reduce(in_pair, group=pair)
    dist.broadcast(first, 1, group=group)
    gather(gathered, mine, group=group)
    scatter(part, torch.arange(float(size)), group=group)
    dist.all_to_all_single(exchanged, torch.arange(float(size)) + 10 * rank, group=group)
    dist.barrier(group=group)

    x = torch.ones(1, requires_grad=True)
    (_SumGradients.apply(x) * (rank + 1)).sum().backward()
    results = {"summed": summed, "in_pair": in_pair, "first": first, "gathered": gathered, "part": part, "grad": x.grad}
    return {name: tensor.tolist() for name, tensor in results.items()} | {"exchanged": exchanged.tolist()}


def _fail(how: str) -> None:
    """Rank 1 fails; the others wait for it."""
    if dist.get_rank() == 1:
        if how == "hang":
            time.sleep(10)
        if how == "die":
            os._exit(7)
        raise ValueError("boom")
    dist.barrier()


def _late() -> None:
    if dist.get_rank() == 1:
        time.sleep(2)
    for _ in range(100):
        dist.all_reduce(torch.full((1,), 100.0))


def _sums_for_two_seconds() -> bool:
    start, right = time.monotonic(), True
    for _ in range(10_000):
        total = torch.ones(1)
        dist.all_reduce(total)
        right = right and total.item() == 2
        over = torch.tensor([float(time.monotonic() - start > 2)])
        dist.broadcast(over, 0)
        if over.item():
            break
        time.sleep(0.001)
    return right


def _fail_everywhere() -> None:
    raise KeyError(f"on rank {dist.get_rank()}")


def _one_more_call() -> None:
    if dist.get_rank() == 0:
        dist.broadcast(torch.ones(1), 0, async_op=True)


def _process() -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def _slice_of_something_large() -> Tensor:
    return (torch.ones(1_000_000, requires_grad=True) * 2)[: dist.get_rank() + 1]


def _expected(rank: int) -> dict[str, list[float]]:
    return {
        "summed": [6.0, 6.0],
        "in_pair": [1.0, 1.0] if rank < 2 else [5.0, 5.0],
        "first": [1.0, 1.0],
        "gathered": [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0],
        "part": [4.0 * rank],
        "exchanged": [float(rank + 10 * other) for other in range(4)],
        "grad": [10.0],
    }


def test_threads_and_processes_agree_on_every_collective(pool4):
    """Guards: a ring whose collectives (also from backward, also on a sub-mesh) differ from gloo's, so that tests on it lie."""
    expected = [_expected(rank) for rank in range(4)]
    assert run_threads(_all_collectives, 4) == expected
    assert pool4.run(_all_collectives) == expected


def test_thread_that_raises_releases_the_others_and_is_named():
    """Guards: ranks left waiting in a barrier for a rank that is gone, and a torch left in its threaded state afterwards."""
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 3 raised ValueError: boom") as caught:
        run_threads(_fail, 3, "raise")
    assert time.monotonic() - start < 5
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, ValueError)
    assert not dist.is_initialized()
    hook = sys.excepthook
    assert run_threads(dist.get_rank, 3) == [0, 1, 2]
    assert sys.excepthook is hook


def test_thread_that_hangs_is_shown():
    """Guards: a test run that stands still because one rank never comes to the collective."""
    with pytest.raises(RankTimeoutError, match=r"time\.sleep") as caught:
        run_threads(_fail, 2, "hang", timeout=0.2)
    assert caught.value.ranks == (0, 1)
    assert run_threads(dist.get_rank, 2) == [0, 1]


def test_thread_left_behind_stays_out_of_later_calls():
    """Guards: a rank that comes back after its call has timed out, and joins, or ends, the collectives of the next one."""
    with pytest.raises(RankTimeoutError):
        run_threads(_late, 2, timeout=0.1)
    assert run_threads(_sums_for_two_seconds, 2, timeout=10) == [True, True]


def test_results_travel_by_value(pool2):
    """Guards: results that keep a graph or a whole storage behind a view (4 MB for 8 bytes)."""
    for rank, result in enumerate(pool2.run(_slice_of_something_large)):
        assert torch.equal(result, torch.full((rank + 1,), 2.0))
        assert not result.requires_grad
        assert result.untyped_storage().nbytes() == 4 * (rank + 1)


def test_failure_on_every_rank_keeps_the_processes(pool2):
    """Guards: a pool that restarts after each expected error, or whose next results are those of the failed call."""
    before = pool2.run(_process)
    assert [rank for rank, _ in before] == [0, 1]
    assert len({os.getpid(), *(pid for _, pid in before)}) == 3
    with pytest.raises(RankError, match=r"raised KeyError: 'on rank"):
        pool2.run(_fail_everywhere)
    assert pool2.run(_process) == before


@pytest.fixture(scope="module")
def broken() -> Iterator[RankPool]:
    """A pool that each test leaves without processes, and in which the next one has to find new ones."""
    with RankPool(2, grace=0.3, start_method="forkserver") as pool:
        yield pool


def test_ranks_out_of_step_are_an_error(broken):
    """Guards: a rank that makes one collective call too many and returns, which makes a later, innocent test hang."""
    with pytest.raises(MismatchError, match="different numbers of collective calls"):
        broken.run(_one_more_call)


def test_rank_that_raises_is_named_though_the_others_wait(broken):
    """Guards: a barrier that outlives the rank it waits for, until a timeout that says nothing about the cause."""
    with pytest.raises(RankError, match=r"rank 1 of 2 raised ValueError: boom\n.*rank 0 did not finish\n(.*\n)+.*in _fail"):
        broken.run(_fail, "raise")


def test_rank_that_dies_is_named_not_its_echo(broken):
    """Guards: the connection error of a healthy rank reported instead of the cause, and a wait for a process that is gone."""
    with pytest.raises(RankError, match=r"rank 1 of 2 died: its process ended with exit code 7") as caught:
        broken.run(_fail, "die")
    assert caught.value.rank == 1


def test_run_ranks_shows_where_ranks_hang():
    """Guards: a timeout that does not say which rank stood where; and one that the start of the processes uses up."""
    with pytest.raises(RankTimeoutError, match=r"did not answer within 1 s\n(.*\n)*--- rank 1 ---\n(.*\n)*.*in _fail"):
        run_ranks(_fail, 2, "hang", timeout=1)


def test_function_that_workers_cannot_import_is_refused(pool2):
    """Guards: an unpicklable function that is found out in the worker, or leaves the pool waiting for an answer."""
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError), match="local object"):
        pool2.run(lambda: None)
