"""One collective, by size."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.adapters.base import Adapter
from benchmarks.tasks import Figures, Prepared

SIZES = {"2 KiB": 2**11, "16 KiB": 2**14, "128 KiB": 2**17, "1 MiB": 2**20, "4 MiB": 2**22, "16 MiB": 2**24}
"""Of the tensor that each rank puts in, or, for an all-gather, takes out."""


def prepare(adapter: Adapter, folder: Path, kind: str) -> Prepared:
    """us of one call, over enough of them to be told from noise, on the process group that the contender started."""
    calls = {name: (make(kind, size), max(1, min(200, 2**22 // size))) for name, size in SIZES.items()}

    def step() -> Figures:
        return {name: each(call, times) for name, (call, times) in calls.items()}

    step()
    return Prepared(step)


def each(call: Callable[[], object], times: int) -> float:
    """us of one of some calls in a row."""
    call()
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) * 1e6 / times


def make(kind: str, size: int) -> Callable[[], object]:
    """A call of `kind` on float32 tensors of `size` bytes."""
    whole = torch.zeros(size // 4)
    part: Tensor = torch.zeros(size // 4 // dist.get_world_size())
    return {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_single(whole, part),
        "reduce-scatter": lambda: dist.reduce_scatter_single(part, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "all-to-all": lambda: dist.all_to_all_single(whole.clone(), whole),
    }[kind]
