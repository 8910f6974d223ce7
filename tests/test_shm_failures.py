"""The backend "shm" when something goes wrong: every rank is told, none hangs, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from forks import Forks
from shardwise.errors import MismatchError, MissingRankError
from shardwise.shm import channel
from shardwise.testing import RankPool
from shm_stress import compared

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def forks():
    """Forks of a process that does nothing else."""
    with RankPool(1, backend=None, start_method="forkserver") as pool:
        yield Forks(pool)


def _killed_at(victim: int, steps: int, count: int) -> tuple[str, str, float]:
    """What the others are told, now and by the next call, when the victim ends at that many steps."""
    if dist.get_rank() == victim:
        publish = channel.Channel.publish

        def last(self: channel.Channel) -> None:
            if self.step == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            publish(self)

        channel.Channel.publish = last
    start = time.monotonic()
    texts = []
    for _ in range(2):
        try:
            dist.all_reduce(torch.ones(count))
            texts.append("nothing")
        except MissingRankError as error:
            texts.append(f"{error} {isinstance(error, dist.DistBackendError)}")
    return texts[0], texts[1], time.monotonic() - start


@pytest.mark.parametrize(("size", "steps", "count"), [(2, 0, 10), (2, 3, 5000), (3, 0, 10), (3, 5, 9000)])
def test_a_killed_rank_is_named_by_all_others(forks, size, steps, count):
    """Guards: ranks that wait for ever, at the beginning of a call or between its chunks, for one whose process has ended."""
    results = forks.run(size, _killed_at, 1, steps, count, slot=4096)
    assert results[1] == "ended with SIGKILL"
    for first, second, seconds in (results[rank] for rank in range(size) if rank != 1):
        assert "rank 1 is gone: its process has ended" in first
        assert f"all_reduce({count} x float32, SUM) (call 1)" in first
        assert first.endswith("True")
        assert second == first
        assert seconds < 5


def _late() -> tuple[str, float]:
    start = time.monotonic()
    if dist.get_rank() == 1:
        time.sleep(2.0)
    try:
        dist.broadcast(torch.ones(3), 0)
    except MissingRankError as error:
        return str(error), time.monotonic() - start
    return "nothing", 0.0


def test_a_rank_that_does_not_come_in_time_is_named(forks):
    """Guards: a wait without an end; a rank that comes too late and finds nobody, and is not told why."""
    (first, seconds), (second, _) = forks.run(2, _late, timeout=0.5)
    assert "rank 1 did not come within 0.5" in first
    assert "its last call was none: it has made no call in this group yet" in first
    assert seconds < 1.9
    assert second == first


def _different(calls: list[str]) -> str:
    x = torch.ones(4)
    dist.barrier()
    try:
        eval(calls[dist.get_rank()], {"dist": dist, "torch": torch, "x": x})
    except MismatchError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("dist.all_reduce(x)", "dist.broadcast(x, 0)", ("all_reduce(4 x float32, SUM)", "broadcast(4 x float32, root 0)")),
        ("dist.all_reduce(x)", "dist.all_reduce(x.double())", ("4 x float32", "4 x float64")),
        ("dist.all_reduce(x)", "dist.all_reduce(x[:3])", ("4 x float32", "3 x float32")),
        ("dist.all_reduce(x)", "dist.all_reduce(x, dist.ReduceOp.MAX)", ("SUM", "MAX")),
        ("dist.broadcast(x, 0)", "dist.broadcast(x, 1)", ("root 0", "root 1")),
        ("dist.barrier()", "dist.all_gather([x.clone(), x.clone()], x)", ("barrier", "all_gather(4 x float32)")),
        (
            "dist.all_to_all_single(x, x.clone(), [1, 3], [1, 3])",
            "dist.all_to_all_single(x, x.clone(), [2, 2], [2, 2])",
            ("sends 3 elements to rank 1", "expects 2 elements of rank 0"),
        ),
        ("dist.all_reduce(x, async_op=True).wait()", "dist.reduce(x, 0)", ("all_reduce", "reduce(4 x float32, SUM, root 0)")),
    ],
)
def test_different_calls_are_an_error_on_every_rank(forks, first, second, said):
    """Guards: data of one call taken for that of another, silently, or a hang on one of the ranks."""
    texts = forks.run(2, _different, [first, second])
    assert texts[0] == texts[1]
    assert "rank 0 and rank 1 made different calls" in texts[0]
    line = [next(line for line in texts[0].splitlines() if line.startswith(f"  rank {rank}")) for rank in range(2)]
    assert said[0] in line[0]
    assert said[1] in line[1]
    assert "(call 2)" in line[0]


def _left() -> str:
    if dist.get_rank() == 1:
        dist.barrier()
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        time.sleep(1.0)
        return ""
    dist.barrier()
    work = dist.all_reduce(torch.ones(3), async_op=True)
    future = work.get_future()
    with pytest.raises(RuntimeError, match="has left the group"):
        future.wait()
    try:
        work.wait()
    except MissingRankError as error:
        assert work.exception() is not None
        return str(error)
    return "nothing"


def test_a_rank_that_has_left_is_named_by_handles_and_futures(forks):
    """Guards: an error that only the thread sees, so that a future never completes."""
    assert "rank 1 has left the group, and rank 0 waits for it in all_reduce(3 x float32, SUM)" in forks.run(2, _left)[0]


def _interrupted() -> str:
    signal.signal(signal.SIGALRM, lambda number, frame: (_ for _ in ()).throw(KeyboardInterrupt))
    if dist.get_rank() == 1:
        time.sleep(0.6)
    else:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        dist.all_reduce(torch.ones(3))
    except KeyboardInterrupt:
        return "interrupted"
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_rank_that_is_interrupted_tells_the_others(forks):
    """Guards: a group whose ranks are in different calls after Ctrl-C on one of them."""
    first, second = forks.run(2, _interrupted)
    assert first == "interrupted"
    assert "rank 0 was interrupted in all_reduce(3 x float32, SUM) (call 1)" in second


def _stopped() -> list[float]:
    x = torch.ones(100_000)
    if dist.get_rank() == 1:
        me = os.getpid()
        if os.fork() == 0:
            time.sleep(0.5)
            os.kill(me, signal.SIGCONT)
            os._exit(0)
        os.kill(me, signal.SIGSTOP)
    before = time.process_time()
    dist.all_reduce(x)
    return [x.min().item(), x.max().item(), time.process_time() - before]


def test_a_stopped_rank_is_waited_for_without_burning_the_processor(forks):
    """Guards: a stopped process taken for an ended one; a rank that spins while another one loads its data."""
    for low, high, seconds in forks.run(2, _stopped):
        assert (low, high) == (2.0, 2.0)
        assert seconds < 0.25


def _everything_used() -> tuple[list[object], list[object]]:
    def held() -> list[object]:
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "shardwise" in line]
        files = sorted(os.listdir("/dev/shm"))
        return [len(os.listdir("/proc/self/fd")), len(maps), threading.active_count(), files]

    dist.barrier()
    before = held()
    for _ in range(3):
        group = dist.new_group(backend="shm")
        dist.all_reduce(torch.ones(300_000), group=group, async_op=True).get_future().wait()
        dist.barrier(group=group)
        if dist.get_rank() == 0:
            dist.send(torch.ones(3), 1, group=group)
        else:
            dist.recv(torch.ones(3), 0, group=group)
        dist.barrier()
        dist.destroy_process_group(group)
    return before, held()


@pytest.mark.parametrize("memfd", [True, False])
def test_a_destroyed_group_leaves_nothing(forks, memfd):
    """Guards: a mapping, a descriptor, a thread or a file for each group that ever was; a /dev/shm file with a name."""
    for before, after in forks.run(2, _everything_used, memfd=memfd):
        assert after == before


def _with_child() -> list[str]:
    dist.barrier()
    ours, theirs = os.pipe()
    if os.fork() == 0:
        try:
            dist.all_reduce(torch.ones(3))
            os.write(theirs, b"nothing")
        except RuntimeError as error:
            os.write(theirs, str(error).encode())
        dist.destroy_process_group()
        os._exit(0)
    os.close(theirs)
    os.wait()
    x = torch.ones(3)
    dist.all_reduce(x)
    return [os.read(ours, 1000).decode(), str(x.sum().item())]


def test_a_fork_cannot_call_and_cannot_break_the_group(forks):
    """Guards: a worker of a data loader that publishes steps in its parent's name, or says that the parent has left."""
    for said, total in forks.run(2, _with_child):
        assert "belongs to the process from which this one was forked" in said
        assert total == "6.0"


def _crowd() -> tuple[float, bool]:
    rank, size = dist.get_rank(), dist.get_world_size()
    half = dist.new_group([other for other in range(size) if other % 2 == 0], backend="shm")
    other = dist.new_group([other for other in range(size) if other % 2], backend="shm")
    mine = (half, other)[rank % 2]
    dist.barrier()
    start = time.monotonic()
    right = True
    for index in range(50):
        x, y = torch.full((1000,), 1.0 + index), torch.full((30_000,), 2.0)
        works = [dist.all_reduce(x, group=mine, async_op=True), dist.all_reduce(y, async_op=True)]
        works[1].wait()
        works[0].wait()
        right &= bool(x.eq((1.0 + index) * size / 2).all() and y.eq(2.0 * size).all())
    return time.monotonic() - start, right


def test_more_ranks_than_cores_in_several_groups(forks):
    """Guards: ranks that spin on the processor that the one they wait for needs; groups that share what is each one's own."""
    for seconds, right in forks.run(8, _crowd):
        assert right
        assert seconds < 20


def test_random_operations_have_the_results_of_gloo(forks):
    """Guards: what only shows in an order of operations that nobody thought of (`shm_stress` tries many more)."""
    assert forks.run(3, compared, 300, 0, slot=4096) == [0, 0, 0]
