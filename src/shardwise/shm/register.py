"""`register`: makes "shm" a backend that `dist.init_process_group` knows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType
from typing import Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, but missing in __all__
from torch.distributed.distributed_c10d import BackendConfig, GroupName

from shardwise.errors import MeshError, describe
from shardwise.shm.channel import Channel, make_shape
from shardwise.shm.group import ShmGroup
from shardwise.shm.segment import Segment, Shape, share

BACKEND = "shm"


class BackendOptions(Protocol):
    """What c10d hands to a creator, of a group and of this rank."""

    store: Store
    group_rank: int
    group_size: int
    timeout: timedelta
    group_id: str
    global_ranks_in_group: Sequence[int]


def register() -> None:
    """Once a process; again it does nothing."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


def why_not(store: Store, rank: int, size: int, refused: bool = False) -> str | None:
    """Why these ranks cannot exchange through shared memory, or None where they can: the same answer on every rank.

    Collective, through the `store`; tries it, with a small segment. `refused`: whether this rank would rather not.
    """
    found = share(PrefixStore("shardwise/shm", store), rank, Shape(size, 1, 0), f"rank {rank} refuses" if refused else None)
    if isinstance(found, Segment):
        found.close()
        return None
    return found


def _create(options: BackendOptions, backend_options: object) -> ShmGroup:
    """What c10d calls for a new group. Raises `MeshError` on every rank where they do not share their memory."""
    rank, size = options.group_rank, options.group_size
    segment = share(options.store, rank, make_shape(size))
    if isinstance(segment, str):
        raise MeshError(
            describe(
                f"the backend {BACKEND!r} cannot serve the process group {options.group_id!r}.",
                why=segment,
                either=["use gloo, or", "start all ranks of the group on one x86-64 Linux host"],
            )
        )
    ranks = list(options.global_ranks_in_group) or list(range(size))
    timeout: timedelta = options.timeout
    channel = Channel(segment, ranks, str(options.group_id), timeout.total_seconds())
    others = {device: name for device, name in _asked_for().items() if name != BACKEND}
    if not others:
        return ShmGroup(channel, str(options.group_id))
    inner = dist.ProcessGroup(PrefixStore("inner/", options.store), rank, size)
    for device, name in others.items():
        _add_backend(inner, device, name, options, backend_options)
    return ShmGroup(channel, str(options.group_id), inner, [torch.device(device) for device in others])


def _asked_for() -> dict[str, str]:
    """The backends of the group that is being made, by device: what c10d does not hand to a creator.

    A creator may return a `ProcessGroup`, which then replaces c10d's whole one, with the backends for all other devices.
    So it has to bring these itself; their names stand in a variable of the caller.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        config = frame.f_locals.get("backend_config")
        if isinstance(config, BackendConfig):
            return {device: str(name) for device, name in config.get_device_backend_map().items()}
        frame = frame.f_back
    return {"cpu": BACKEND}


def _add_backend(inner: dist.ProcessGroup, device: str, name: str, options: BackendOptions, backend_options: object) -> None:
    store, rank, size, timeout = options.store, options.group_rank, options.group_size, options.timeout
    prefixed = PrefixStore(f"{device}/", store)
    if name == "gloo":
        gloo = dist.ProcessGroupGloo(prefixed, rank, size, timeout=timeout)
        gloo._set_sequence_number_for_group()
        inner._register_backend(torch.device(device), dist.ProcessGroup.BackendType.GLOO, gloo)
    elif name == "nccl":
        wanted = (
            backend_options if isinstance(backend_options, dist.ProcessGroupNCCL.Options) else dist.ProcessGroupNCCL.Options()
        )
        wanted._timeout = timeout
        wanted.global_ranks_in_group = list(options.global_ranks_in_group)
        wanted.group_name = GroupName(options.group_id)
        nccl = dist.ProcessGroupNCCL(prefixed, rank, size, wanted)
        nccl._set_sequence_number_for_group()
        inner._register_backend(torch.device(device), dist.ProcessGroup.BackendType.NCCL, nccl)
        inner._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
    else:
        raise MeshError(f"beside {BACKEND!r}, {device} can have nccl or gloo, not {name!r}.")
