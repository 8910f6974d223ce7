"""`fake_rank`: one rank of many, alone in this process, on torch's fake process group: a private API, used here alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  # registers the backend
from torch._C._distributed_c10d import Store


class _EveryoneIsThere(Store):
    """A key-value store in which every rank has done whatever this one asks about."""

    def add(self, key: str, value: int) -> int:
        """As if the others had counted as far as this rank."""
        return 1

    def set(self, key: str, value: str) -> None:
        """Nobody reads it."""

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """For nothing."""

    def check(self, keys: list[str]) -> bool:
        """Nobody has said anything."""
        return False


@contextmanager
def fake_rank(size: int, rank: int = 0) -> Iterator[None]:
    """In the block this process is `rank` of `size` on a default process group whose collectives return at once.

    Nothing is moved: sums are this rank's part, what others would send is this rank's own or undefined. So shapes, memory,
    kernels and host time are those of a rank of that size, without the wait for others, and numbers mean nothing.
    """
    store = _EveryoneIsThere()  # named: torch's own reference would not keep the methods of this class alive
    dist.init_process_group("fake", store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
