"""The backend "shm": messages from rank to rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from shardwise.testing import RankPool
from shm_cases import Groups

pytestmark = pytest.mark.timeout(120)

LONG = 500_000  # more than a mailbox holds


@pytest.fixture(scope="module")
def groups():
    """Groups of up to three ranks."""
    with RankPool(3, backend=None, start_method="forkserver") as pool:
        yield Groups(pool)


def _back_and_forth() -> None:
    rank = dist.get_rank()
    for count in (0, 1, 7, 1 << 14, (1 << 14) + 1, LONG):
        for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64):
            x = (torch.arange(count) % 2).to(dtype)
            if rank == 0:
                dist.send(x, 1)
                dist.recv(x.zero_(), 1)
                assert torch.equal(x, (torch.arange(count) % 2 == 0).to(dtype))
            else:
                y = torch.empty(count, dtype=dtype)
                dist.recv(y, 0)
                assert torch.equal(x, y)
                dist.send((torch.arange(count) % 2 == 0).to(dtype), 0)
    column = torch.zeros(5, 3)
    if rank == 0:
        dist.send(torch.arange(10.0)[::2], 1)
    else:
        dist.recv(column[:, 1], 0)
        assert column[:, 1].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
        assert column[:, 0].eq(0).all()


def test_messages_of_every_size(groups):
    """Guards: pieces of a long message in the wrong order, an empty one that never comes, strides that are not written."""
    groups.run(2, _back_and_forth)


def _tags() -> None:
    rank = dist.get_rank()
    if rank == 0:
        for tag in (3, 1, 2):
            dist.send(torch.full((100,), float(tag)), 1, tag=tag)
        works = [dist.isend(torch.full((LONG,), float(tag)), 1, tag=tag) for tag in (5, 4)]
        [work.wait() for work in works]
    else:
        for tag in (1, 2, 3):
            x = torch.empty(100)
            dist.recv(x, 0, tag=tag)
            assert x.eq(tag).all()
        tensors = {tag: torch.empty(LONG) for tag in (4, 5)}
        works = [dist.irecv(tensors[tag], 0, tag=tag) for tag in (4, 5)]
        [work.wait() for work in works]
        assert all(tensors[tag].eq(tag).all() for tag in (4, 5))
    dist.barrier()


def test_messages_are_found_by_their_tag(groups):
    """Guards: a message given to who asked for another tag, and one that came before it was asked for lost."""
    groups.run(2, _tags)


def _ring() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    x, y = torch.full((LONG,), float(rank)), torch.empty(LONG)
    works = dist.batch_isend_irecv([dist.P2POp(c10d.isend, x, (rank + 1) % size), dist.P2POp(c10d.irecv, y, (rank - 1) % size)])
    for work in works:
        work.wait()
    assert y.eq((rank - 1) % size).all()
    if rank == 0:
        found = set()
        for _ in range(size - 1):
            z = torch.empty(3)
            source = dist.recv(z)
            assert z.eq(source).all()
            found.add(source)
        assert found == set(range(1, size))
    else:
        dist.send(torch.full((3,), float(rank)), 0)


def test_a_ring_of_long_messages_and_whoever_comes_first(groups):
    """Guards: ranks that all wait for room in the next one's mailbox; a receiver from anybody that names the wrong sender."""
    groups.run(3, _ring)


def _crossed() -> float:
    rank = dist.get_rank()
    x, y = torch.ones(LONG), torch.empty(LONG)
    if rank == 0:
        work = dist.all_reduce(x, async_op=True)
        dist.send(torch.full((LONG,), 7.0), 1)
        work.wait()
    else:
        dist.recv(y, 0)
        dist.all_reduce(x)
    if rank == 0:
        sent = dist.isend(y.fill_(5.0), 1)
        dist.all_reduce(x)
        sent.wait()
    else:
        dist.all_reduce(x)
        dist.recv(y, 0)
    return x.max().item() + y.max().item()


def test_messages_and_collectives_in_legal_orders(groups):
    """Guards: a collective that waits for a message that waits for the collective, both begun in time."""
    assert groups.run(2, _crossed) == [9.0] * 2


def _wrong_size() -> str:
    if dist.get_rank() == 0:
        dist.send(torch.ones(3), 1)
        return ""
    try:
        dist.recv(torch.ones(4), 0)
    except dist.DistBackendError as error:
        return str(error)
    return "nothing"


def test_a_message_of_another_size_is_an_error(groups):
    """Guards: half a message written, and the rest taken for the next one."""
    assert "has sent 12 bytes" in groups.run(2, _wrong_size)[1]


def _begun_in_one_call_and_continued_in_another() -> None:
    rank, store = dist.get_rank(), c10d._get_default_store()
    long, short = torch.full((LONG,), 7.0), torch.ones(3)
    if rank == 1:
        store.wait(["waiting"])
        work = dist.isend(long, 0)
        store.set("begun", "")
        store.wait(["looked"])
        late = dist.irecv(short, 2)  # which moves more of the long one
        store.set("more", "")
        store.wait(["asked"])
        work.wait()
        late.wait()
    elif rank == 2:
        store.wait(["begun"])
        dist.send(short, 0)
        store.wait(["asked"])
        dist.send(short, 1)
        dist.send(short * 2, 0)
    else:
        work = dist.irecv(short, 2)
        store.set("waiting", "")
        work.wait()  # finds the beginning of the long one, for which nobody has asked
        store.set("looked", "")
        store.wait(["more"])
        found = torch.empty(3)
        work = dist.irecv(found, 2)
        store.set("asked", "")
        dist.recv(long.zero_(), 1)
        work.wait()
        assert long.eq(7).all()
        assert found.eq(2).all()


def test_a_message_that_is_taken_by_several_calls(groups):
    """Guards: memory for what nobody has asked for, made in one of torch's modes and written to in another: an error that came
    once in a hundred times.
    """
    groups.run(3, _begun_in_one_call_and_continued_in_another)
