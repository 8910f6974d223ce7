"""The default process group, where nobody has started one: which backend, from what torchrun says and the devices can."""

from __future__ import annotations

import atexit
import logging
import os
import time
from functools import cache

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from shardwise import shm
from shardwise.errors import MeshError, describe
from shardwise.rendezvous import meeting_place

CPU_BACKEND = "SHARDWISE_CPU_BACKEND"
"""The environment variable that can say `gloo`, for collectives on CPUs."""


def start_process_group(kind: str) -> None:
    """Start the default process group, of the ranks that torchrun's variables name, which compute on devices of this `kind`:
    nccl on GPUs, gloo with a warning where ranks share one; on CPUs shared memory (`shardwise.shm`) where all ranks are on one
    host that can, else gloo, and gloo also where the environment says so. Collective.

    Raises `MeshError` for variables that are wrong, and `MissingRankError` when some process never comes.
    """
    wanted = _wanted_cpu_backend()
    if kind != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    if kind not in ("cpu", "cuda"):
        dist.init_process_group()
        return
    store, rank, size = meeting_place()
    shared = []
    if kind == "cuda":
        shared = _shared_devices(store, rank, size, str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    if shared and rank == 0:
        logging.getLogger(__name__).warning(
            "Ranks %s share a GPU, which nccl refuses: gloo is used, and every collective goes through the CPU, slowly. "
            "For speed, and for torch.compile, whose collectives end the process there, start no more ranks than GPUs.",
            " and ".join(map(str, shared)),
        )
    own = "gloo" if shared else _cpu_backend(wanted, store, rank, size)
    backend = own if shared else f"cpu:{own}" if kind == "cpu" else f"cpu:{own},cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    store.set_timeout(dist.default_pg_timeout)


def _wanted_cpu_backend() -> str:
    wanted = os.environ.get(CPU_BACKEND, shm.BACKEND)
    if wanted not in ("gloo", shm.BACKEND):
        raise MeshError(
            describe(
                f"{CPU_BACKEND}={wanted} names no backend for CPUs.",
                either=[f"{CPU_BACKEND}=gloo, or", "leave it out: shm where all ranks are on one host that can, else gloo"],
            )
        )
    return wanted


def _cpu_backend(wanted: str, store: Store, rank: int, size: int) -> str:
    """The same on every rank, whatever the others want: gloo, unless all can have and none refuses shared memory."""
    return shm.BACKEND if shm.why_not(store, rank, size, refused=wanted == "gloo") is None else "gloo"


def _shared_devices(store: Store, rank: int, size: int, device: str) -> list[int]:
    """The first ranks found that compute on one device; none where each has its own. Collective, through the `store`.

    `device` names this rank's device among those of all machines. Every rank gets the same answer, so all can choose the same
    backend; counting the devices that a rank sees would not do, as a launcher may show each rank its own alone.
    """
    store.set(f"shardwise/device/{rank}", device)
    holders: dict[str, list[int]] = {}
    for other in range(size):
        holders.setdefault(store.get(f"shardwise/device/{other}").decode(), []).append(other)
    return next((ranks for ranks in holders.values() if len(ranks) > 1), [])


@cache
def settle_at_exit() -> None:
    """Let gloo's threads finish before the interpreter goes away, once a process.

    A gloo thread frees the tensors of a collective some microseconds after the main thread has its result. If Python is already
    finalizing by then, that thread is unwound inside a destructor, and the process aborts with "terminate called without an
    active exception" (torch 2.13: 21 of 32 runs of a script that ends right behind an all-reduce; with the pause, 0 of 24).
    """
    atexit.register(time.sleep, 0.1)


def check_variables() -> None:
    """Raise `MeshError` where only one of the launcher's variables is set: each process would load the whole model."""
    missing = "RANK" if "RANK" not in os.environ else "WORLD_SIZE"
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    if (size, rank) != ("1", "0"):
        name, value = ("WORLD_SIZE", size) if missing == "RANK" else ("RANK", rank)
        raise MeshError(
            describe(
                f"{name}={value} is set, and {missing} is not: is this one of several processes, or the only one?",
                either=[f"start with torchrun, which sets both, or set {missing}, or", f"take {name} out of the environment"],
            )
        )
