"""One rank's trace, with all that is needed to lay it beside the others'."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from shardwise.profiling.clock import Mark, Offset, host_offset, make_marks, this_host
from shardwise.profiling.ranges import Ranges

STEP = "ProfilerStep#0"
"""The range of the step; under this name other tools look for steps."""


@dataclass(frozen=True)
class Record:
    """What one rank knows besides its trace.

    Attributes:
        rank, size: of the default group.
        device: "cpu" or "cuda".
        backend: of the default group, as "cpu:shm".
        threads: that an operator computes on.
        marks: of the clock; the first half before the step.
        offset: to rank 0's clock.
        spans: autograd's sequence numbers by module, see `Places.spans`; empty for compiled code, in which no module is seen.
        flops: of the operators whose number of operations torch knows, in the step.
        seconds: of the steps that were timed without the profiler.
        collectives: as `Collective` in dicts, from a step of its own; empty where that was not made.
    """

    rank: int
    size: int
    device: str
    backend: str
    threads: int
    marks: list[Mark]
    offset: Offset
    spans: list[tuple[int, str]]
    flops: float
    seconds: list[float] = field(default_factory=list)
    collectives: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        """What `asdict` and JSON have made of one."""
        known = {
            "marks": [Mark(**mark) for mark in values["marks"]],
            "offset": Offset(**values["offset"]),
            "spans": [(number, path) for number, path in values["spans"]],
        }
        return cls(**values | known)


class Capture:
    """Profile what runs in the `with` block, on this rank. Every rank of the default group does it: they begin together.

    Args:
        device: where the model is.
        modules: whether there are ranges for modules; not for compiled code, which would be compiled anew because of them.
        stacks: whether the trace has Python's frames.

    `seconds` is how long it took, afterwards.
    """

    def __init__(self, device: torch.device, *, modules: bool = True, stacks: bool = False) -> None:
        self._device = device
        self._ranges = Ranges() if modules else None
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities, record_shapes=True, profile_memory=True, with_flops=True, with_stack=stacks
        )
        self._step = record_function(STEP)
        self._marks: list[Mark] = []
        self._offset = Offset()
        self.seconds = 0.0

    def __enter__(self) -> Capture:
        self._profile.__enter__()
        self._marks = make_marks()
        if dist.is_initialized():
            dist.barrier()
        synchronize(self._device)
        if self._ranges is not None:
            self._ranges.start()
        self._step.__enter__()
        self.seconds = -time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            synchronize(self._device)
        self.seconds += time.perf_counter()
        self._step.__exit__(kind, error, traceback)
        if self._ranges is not None:
            self._ranges.stop()
        self._marks += make_marks()
        self._profile.__exit__(kind, error, traceback)
        if error is None and dist.is_initialized():  # at once: two hosts' clocks drift apart
            store = dist.distributed_c10d._get_default_store()
            self._offset = host_offset(store, dist.get_rank(), dist.get_world_size(), this_host())

    def record(self, **known: Any) -> Record:
        """What is to be kept beside the trace; `known` are the fields that the caller has."""
        parallel = dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        return Record(
            rank=rank,
            size=size,
            device=self._device.type,
            backend=dist.get_backend_config() if parallel else "",
            threads=torch.get_num_threads(),
            marks=self._marks,
            offset=self._offset,
            spans=self._ranges.spans if self._ranges is not None else [],
            flops=float(sum(event.flops or 0 for event in self._profile.key_averages())),
            **known,
        )

    def save(self, folder: Path, record: Record) -> None:
        """Write `traces/rankN.json.gz`, the trace as torch gives it, and `records/rankN.json` into `folder`.

        Apart from each other, because other tools take all that lies in a folder for traces.
        """
        for file in (trace_file(folder, record.rank), record_file(folder, record.rank)):
            file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            raw = Path(scratch, "trace.json")
            self._profile.export_chrome_trace(str(raw))
            with gzip.open(trace_file(folder, record.rank), "wb", compresslevel=5) as compressed:
                compressed.write(raw.read_bytes())
        record_file(folder, record.rank).write_text(json.dumps(asdict(record)), encoding="utf-8")


def trace_file(folder: Path, rank: int) -> Path:
    """The trace of one rank."""
    return folder / "traces" / f"rank{rank}.json.gz"


def record_file(folder: Path, rank: int) -> Path:
    """What it knows besides."""
    return folder / "records" / f"rank{rank}.json"


def synchronize(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
