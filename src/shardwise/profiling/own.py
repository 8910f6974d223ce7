"""`profiler`: the same for a step of a loop that is not ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from shardwise.mesh import local_device
from shardwise.profiling.capture import Capture
from shardwise.profiling.result import Profile
from shardwise.profiling.settings import COMPILED, EAGER, OURS, Cell


class Profiling:
    """What `profiler` gives. `result` is there after the block, on rank 0; None on the others, and before."""

    result: Profile | None = None


@contextmanager
def profiler(
    folder: str | os.PathLike[str] = "profile-output", *, compiled: bool = False, stacks: bool = False
) -> Iterator[Profiling]:
    """Profile what runs in the block, on all ranks of the default process group: each enters it, and they begin together.

        with shardwise.profiler("profile-output") as profiling:
            model(input_ids=ids, labels=ids).loss.backward()
        if profiling.result is not None:  # rank 0
            print(profiling.result)

    Writes each rank's trace, and that of all for Perfetto, into `folder`, which all ranks see. Make the same step before: the
    first one takes longer, and `torch.compile` compiles in it.

    Args:
        folder: to write to.
        compiled: the model is compiled. No modules are looked at then: their hooks would have it compiled anew.
        stacks: Python's frames in the traces.

    Which calls of the ranks are one collective is known by their order on the process group: where there are several groups,
    nothing is said of who waited for whom.
    """
    profiling = Profiling()
    cell = Cell(OURS, COMPILED if compiled else EAGER)
    own, where = Path(folder), Path(folder) / "ranks" / cell.key
    capture = Capture(local_device(None), modules=not compiled, stacks=stacks)
    with capture:
        yield profiling
    capture.save(where, capture.record())
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size > 1:
        dist.barrier()
    if size == 1 or dist.get_rank() == 0:
        profiling.result = Profile.read(where, cell, size)
        profiling.result.save(own)
