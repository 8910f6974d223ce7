"""Times of a step: on the device by events, on the host until the last launch, in kernels by the profiler; and memory."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gpu.steps import Step


@dataclass(frozen=True)
class Sample:
    """One run of a step, in ms for each of what is counted: on the device from begin to end, and on the host."""

    device: float
    host: float


@dataclass(frozen=True)
class Profile:
    """One run of a step under the profiler, in ms for each of what is counted.

    Args:
        kernels: sum of all kernels and copies.
        busy: time in which at least one of them ran.
        launches: how many.
    """

    kernels: float
    busy: float
    launches: float

    def to_json(self) -> dict[str, float]:
        """For the protocol."""
        return asdict(self)


def sample(step: Step, count: int, runs: int, device: str) -> list[Sample]:
    """Times of some runs, each on an idle device, behind one that does not count."""
    step()
    return [_cuda_sample(step, count) if device == "cuda" else _cpu_sample(step, count) for _ in range(runs)]


def _cuda_sample(step: Step, count: int) -> Sample:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    start.record()
    step()
    end.record()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    return Sample(start.elapsed_time(end) / count, host * 1e3 / count)


def _cpu_sample(step: Step, count: int) -> Sample:
    began = time.perf_counter()
    step()
    elapsed = (time.perf_counter() - began) * 1e3 / count
    return Sample(elapsed, elapsed)


def peak_memory(step: Step, device: str) -> int:
    """The most bytes of the device that tensors take during a step; 0 on a CPU."""
    if device != "cuda":
        return 0
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def profile(step: Step, count: int, device: str, trace: Path | None) -> Profile:
    """One run under the profiler; the trace, with what the host does, is kept, compressed, where a path for it is given."""
    activities = [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    if trace is not None or device == "cpu":
        activities.append(torch.profiler.ProfilerActivity.CPU)
    step()
    _synchronize(device)
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        _synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(raw))
        text = raw.read_bytes()
    if trace is not None:
        with gzip.open(f"{trace}.json.gz", "wb", compresslevel=6) as file:
            file.write(text)
    return _on_the_device(json.loads(text)["traceEvents"], count)


def _on_the_device(events: list[dict[str, object]], count: int) -> Profile:
    work = sorted(
        (float(str(event["ts"])), float(str(event["ts"])) + float(str(event["dur"])))
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    busy, until = 0.0, float("-inf")
    for begin, end in work:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    total = sum(end - begin for begin, end in work)
    return Profile(total / 1e3 / count, busy / 1e3 / count, len(work) / count)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
