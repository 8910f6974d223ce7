"""Ranks that are forks of one process: they start in milliseconds, and may be killed."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from shardwise.shm import channel, segment
from shardwise.testing import RankPool


class Forks:
    """A process that forks the ranks, fresh ones for each call."""

    def __init__(self, pool: RankPool) -> None:
        self._pool = pool
        self._turn = 0

    def run(self, size: int, fn: Callable[..., object], *args: object, **options: object) -> list[object]:
        """`fn(*args)` on a default group of `size` ranks: what each returned, the exception that it raised, or how it ended."""
        self._turn += 1
        (results,) = self._pool.run(fork_ranks, self._turn, size, fn, args, options, timeout=60)
        return results


def fork_ranks(
    turn: int, size: int, fn: Callable[..., object], args: tuple[object, ...], options: dict[str, object]
) -> list[object]:
    """In the process that forks: the ranks' results."""
    ends = []
    for rank in range(size):
        ours, theirs = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(ours)
            _live(theirs, turn, rank, size, fn, args, **options)
        os.close(theirs)
        ends.append((process, ours))
    results = []
    for process, ours in ends:
        with open(ours, "rb") as pipe:
            body = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        results.append(pickle.loads(body) if body else f"ended with {signal.Signals(-code).name if code < 0 else code}")
    return results


def _live(
    pipe: int,
    turn: int,
    rank: int,
    size: int,
    fn: Callable[..., object],
    args: tuple[object, ...],
    timeout: float = 30.0,
    slot: int = channel.SLOT_BYTES,
    memfd: bool = True,
    destroy: bool = True,
) -> None:
    torch.set_num_threads(1)
    signal.alarm(45)  # so that no test leaves a process behind
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(channel, "SLOT_BYTES", slot)
            if not memfd:
                patch.setattr(segment, "_memfd", _no_memfd)
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            dist.init_process_group(
                "shm",
                store=dist.PrefixStore(f"fork{turn}", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
            )
        result: object = fn(*args)
        if destroy:
            dist.destroy_process_group()
    except BaseException as error:
        error.add_note(traceback.format_exc()) if hasattr(error, "add_note") else None
        result = error
    try:
        os.write(pipe, pickle.dumps(result))
    finally:
        os._exit(0)


def _no_memfd(size: int) -> tuple[int, str]:
    raise OSError("no memfd here")
