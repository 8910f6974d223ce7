"""Where the tests marked `gpu` run: ranks on the machine's GPUs, which they share where there is only one.

SHARDWISE_REHEARSE=1 runs the same tests on CPUs, without what only a GPU has, so that they do not rot where there is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardwise.testing import RankPool

REHEARSED = bool(os.environ.get("SHARDWISE_REHEARSE"))
DEVICE = "cuda" if torch.cuda.is_available() and not REHEARSED else "cpu"
needs_cuda = pytest.mark.skipif(REHEARSED, reason="only a GPU has it")

compiles = pytest.mark.skipif(
    not REHEARSED and torch.cuda.device_count() < 2,
    reason="two ranks share a GPU, and gloo ends the process when compiled code gives it CUDA tensors (torch 2.11)",
)


@contextmanager
def pool(size: int, backend: str | None = "") -> Iterator[RankPool]:
    """`size` ranks on the GPUs, with nccl where each can have its own, else gloo; or with `backend`."""
    own = DEVICE == "cuda" and size <= torch.cuda.device_count()
    chosen = ("cpu:gloo,cuda:nccl" if own else "gloo") if backend == "" else backend
    with RankPool(size, backend=chosen, device=DEVICE, timeout=240.0) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Two of them."""
    with pool(2) as started:
        yield started


@pytest.fixture(scope="module")
def one() -> Iterator[RankPool]:
    """One rank alone, on nccl where there is a GPU."""
    with pool(1) as started:
        yield started


def axis(device: str = DEVICE) -> DeviceMesh:
    """On a rank: all ranks as the tp axis."""
    return init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))


def captures() -> bool:
    """On a rank: whether its collectives can be captured in a CUDA graph, which gloo's cannot."""
    return DEVICE == "cuda" and "cuda:nccl" in dist.get_backend_config()
