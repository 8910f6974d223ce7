"""Random operations on the backend "shm" beside gloo, by hand: python tests/shm_stress.py --count 100000 --seed 0 --ranks 3

With --kills N it forms N groups instead, and kills a random rank of each at a random moment: all others must be told its name.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch import Tensor

from forks import Forks
from shardwise.errors import MissingRankError
from shardwise.testing import RankPool
from shm_cases import same, values

DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)
OPS = (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT)


def pair(count: int, seed: int, ours: dist.ProcessGroup, theirs: dist.ProcessGroup) -> int:
    """`count` random operations on both groups; how many came out differently."""
    draw = random.Random(seed)
    wrong = 0
    open_works: list[tuple[dist.Work, Tensor, Tensor]] = []
    for number in range(count):
        kind = draw.choice(
            ("all_reduce",) * 4 + ("broadcast", "all_gather", "reduce_scatter", "all_to_all", "barrier", "message")
        )
        size = draw.choice((0, 1, 2, 5, 64, 513, 1024, 1025, 3000))
        dtype, op, root = draw.choice(DTYPES), draw.choice(OPS), draw.randrange(dist.get_world_size())
        source = values(size, dtype, dist.get_rank(), number)
        later = kind == "all_reduce" and draw.random() < 0.3
        first, second = (_one(kind, group, source, op, root, later and group is ours) for group in (ours, theirs))
        if isinstance(first, tuple):
            open_works.append((first[0], first[1], second))
        else:
            wrong += not same(first, second)
        if len(open_works) > draw.randrange(8):
            draw.shuffle(open_works)
            for work, mine, other in open_works:
                work.wait()
                wrong += not same(mine, other)
            open_works.clear()
    for work, mine, other in open_works:
        work.wait()
        wrong += not same(mine, other)
    return wrong


def _one(
    kind: str, group: dist.ProcessGroup, source: Tensor, op: dist.ReduceOp, root: int, later: bool
) -> Tensor | tuple[dist.Work, Tensor]:
    size, rank = dist.get_world_size(), dist.get_rank()
    x = source.clone()
    if kind == "all_reduce":
        work = dist.all_reduce(x, op, group=group, async_op=later)
        return (work, x) if later else x
    if kind == "broadcast":
        dist.broadcast(x, root, group=group)
        return x
    if kind == "all_gather":
        outputs = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(outputs, x, group=group)
        return torch.stack(outputs)
    if kind == "reduce_scatter":
        dist.reduce_scatter(x, [source + to for to in range(size)], op, group=group)
        return x
    if kind == "all_to_all":
        outputs = [torch.empty_like(x) for _ in range(size)]
        dist.all_to_all(outputs, [source + to for to in range(size)], group=group)
        return torch.stack(outputs)
    if kind == "message" and size > 1:
        work = dist.isend(source, (rank + 1) % size, group=group)
        dist.recv(x, (rank - 1) % size, group=group)
        work.wait()
        return x
    dist.barrier(group=group)
    return x


def compared(count: int, seed: int) -> int:
    """On a rank of a group "shm" with small slots, so that there are many chunks: `pair` beside a new gloo group."""
    return pair(count, seed, dist.group.WORLD, dist.new_group(backend="gloo"))


def until_killed(victim: int, seconds: float, seed: int) -> str:
    """Random operations until a rank ends, which the victim does after so many seconds; what the others are told."""
    if dist.get_rank() == victim:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    draw = random.Random(seed)
    try:
        while True:
            kind = draw.choice(("all_reduce", "broadcast", "all_gather", "all_to_all", "message"))
            source = values(draw.choice((1, 100, 2000)), torch.float32, dist.get_rank())
            _one(kind, dist.group.WORLD, source, dist.ReduceOp.SUM, 0, False)
    except MissingRankError as error:
        return str(error).splitlines()[0]


def main() -> int:
    """Run what the arguments say; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=0)
    wanted = parser.parse_args()
    draw = random.Random(wanted.seed)
    bad = done = 0
    start = time.monotonic()
    with RankPool(1, backend=None) as pool:
        forks = Forks(pool)
        for turn in range(wanted.kills):
            victim = draw.randrange(wanted.ranks)
            found = forks.run(wanted.ranks, until_killed, victim, draw.random() * 0.2, turn, slot=4096)
            told = [text for rank, text in enumerate(found) if rank != victim]
            right = all(isinstance(text, str) and f"rank {victim} is gone" in text for text in told)
            bad += found[victim] != "ended with SIGKILL" or not right
        while not wanted.kills and done < wanted.count:
            each = min(2000, wanted.count - done)
            found = forks.run(wanted.ranks, compared, each, draw.randrange(1 << 30), slot=4096)
            bad += sum(one if isinstance(one, int) else each for one in found)
            done += each
    what = f"{wanted.kills} kills" if wanted.kills else f"{done} operations"
    sys.stdout.write(f"{what} on {wanted.ranks} ranks, {bad} wrong, {time.monotonic() - start:.0f} s\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
