"""`delayed_mesh`: a slow network, to see what of it is hidden: each collective takes a known time, while ranks compute on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import Work
from torch.distributed.device_mesh import DeviceMesh

_NAME = "delayed"
_COLLECTIVES = (
    "allreduce",
    "allreduce_coalesced",
    "broadcast",
    "allgather",
    "allgather_into_tensor_coalesced",
    "all_gather_single",
    "all_gather_single_coalesced",
    "_allgather_base",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "_reduce_scatter_base",
    "all_to_all_single",
    "alltoall_base",
    "alltoall",
    "scatter",
    "gather",
    "reduce",
    "barrier",
)


def delayed_mesh(delay: float = 0.0, axis: str = "tp", backend: str = "gloo") -> DeviceMesh:
    """All ranks as a one-dimensional CPU mesh called `axis`, on a new group of `backend`, with `delay` seconds a collective.

    `mesh.get_group().delay` may be set to another number at any time. Collective; the default process group must be there.
    """
    with suppress(AssertionError):  # torch keeps the backends of a process: registered by an earlier call
        dist.Backend.register_backend(_NAME, _group_over, extended_api=True, devices=["cpu"])
    group = dist.new_group(backend=_NAME, pg_options=dist.new_group(backend=backend))
    assert isinstance(group, DelayedGroup)
    group.delay = delay
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=(axis,))


class DelayedGroup(dist.ProcessGroup):
    """The collectives of another group, each ready `delay` seconds after it was started, or when the other group's is.

    As on one network link, a collective starts when the one before has ended. Nothing of the delay is spent computing: who
    waits at once, as every synchronous call does, is blocked for `delay` seconds; who computes meanwhile, for what is left.

    Args:
        inner: does the work.
        rank: this rank.
        size: number of ranks.

    `blocked` is how many seconds callers had to wait, in all (a busy machine may wake them later). Where `events` is given a
    list, it gets what happens, in order: "start NAME" when a collective is called, "wait NAME" when somebody waits for it;
    callers may add their own.
    """

    def __init__(self, inner: dist.ProcessGroup, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # torch's stub knows another constructor only
        self.delay, self.blocked = 0.0, 0.0
        self.events: list[str] | None = None
        self._inner, self._rank, self._size = inner, rank, size
        self._free = 0.0

    def rank(self) -> int:
        """This rank."""
        return self._rank

    def size(self) -> int:
        """Number of ranks."""
        return self._size

    def getBackendName(self) -> str:
        """Of this backend."""
        return _NAME

    @property
    def group_name(self) -> Any:
        """The name under which torch knows the group."""
        return dist.distributed_c10d._world.pg_names[self]

    def start(self, name: str, *args: Any, **kwargs: Any) -> Work:
        """Start the inner group's collective called `name`."""
        if self.events is not None:
            self.events.append(f"start {name}")
        self._free = max(time.monotonic(), self._free) + self.delay
        return _DelayedWork(getattr(self._inner, name)(*args, **kwargs), self._free, name, self)


class _DelayedWork(Work):
    def __init__(self, inner: Work, ready: float, name: str, group: DelayedGroup) -> None:
        super().__init__()
        self._inner, self._ready, self._name, self._group = inner, ready, name, group

    def is_completed(self) -> bool:
        return time.monotonic() >= self._ready and self._inner.is_completed()

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._group.events is not None:
            self._group.events.append(f"wait {self._name}")
        start = time.monotonic()
        done = self._inner.wait() if timeout is None else self._inner.wait(timeout)
        self._group.blocked += max(time.monotonic(), self._ready) - start
        while (left := self._ready - time.monotonic()) > 0:
            time.sleep(left)
        return done


def _group_over(options: Any, inner: dist.ProcessGroup) -> DelayedGroup:
    return DelayedGroup(inner, options.group_rank, options.group_size)


def _collective(name: str) -> Callable[..., Work]:
    def call(self: DelayedGroup, *args: Any, **kwargs: Any) -> Work:
        return self.start(name, *args, **kwargs)

    return call


for _name in _COLLECTIVES:
    setattr(DelayedGroup, _name, _collective(_name))
