"""Before a collective verb starts: whether every rank has called it. A rank that never comes is an error, not a hang."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from shardwise.errors import MissingRankError, describe

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DEFAULT_TIMEOUT = 15.0
"""Seconds that a rank waits for the others to make the same call."""

_POLL_SECONDS = 0.005


def meet(mesh: DeviceMesh, what: str, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Wait until every rank of `mesh` has called `what` as often as this one.

    Goes through the process group's key-value store, so it also answers when the others are in another collective, or gone.
    Raises `MissingRankError` after `timeout` seconds, naming the ranks that did not come.
    """
    store = dist.distributed_c10d._get_default_store()
    ranks = dist.get_process_group_ranks(mesh.get_group())
    prefix = f"shardwise/{what}/{'-'.join(map(str, ranks))}"
    turn = store.add(f"{prefix}/{dist.get_rank()}", 1)
    deadline, missing = time.monotonic() + timeout, ranks
    while missing := [rank for rank in missing if store.add(f"{prefix}/{rank}", 0) < turn]:
        if time.monotonic() > deadline:
            store.add(f"{prefix}/{dist.get_rank()}", -1)
            absent = ", ".join(map(str, missing))
            raise MissingRankError(
                describe(
                    f"{what}: after {timeout:g} s, rank {absent} had not called it; rank {dist.get_rank()} had.",
                    why="each rank holds a part of the model, so every rank must make this call",
                    either=["take it out of `if rank == 0:`, or", "if a rank is only late, give it more time: timeout=..."],
                )
            )
        time.sleep(_POLL_SECONDS)
