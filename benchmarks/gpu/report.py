"""The figures as JSON and as tables."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.gpu.driver import Reply, Result
from benchmarks.gpu.steps import CELLS
from benchmarks.markdown import table

MIB = 2**20


def write(results: list[Result], options: dict[str, object], folder: Path) -> None:
    """`report.json`, with every sample, and `report.md`."""
    cuda = torch.cuda.is_available() and options["device"] == "cuda"
    facts = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "options": options,
    }
    everything = facts | {"results": [asdict(result) for result in results]}
    (folder / "report.json").write_text(json.dumps(everything, indent=1))
    (folder / "report.md").write_text("\n".join(_page(results, facts)) + "\n")


def _page(results: list[Result], facts: dict[str, object]) -> list[str]:
    lines = [
        f"{facts['device']}, torch {facts['torch']}. ms for a training step, or for a decoded token: median (10th to 90th "
        "percentile).",
        "Device: from the first kernel's launch to the last one's end. Host: until the last launch. Idle: device less the time",
        "in which a kernel runs. Memory: the most that tensors take, in MiB.",
    ]
    dtypes = list(dict.fromkeys(result.case.dtype for result in results))
    for dtype in dtypes:
        for cell in CELLS:
            rows = [row for result in results if result.case.dtype == dtype and (row := _row(result, cell, results))]
            if rows:
                heads = ["backend", "tp", "transformers", "device", "x floor", "host", "kernels", "idle", "launches", "memory"]
                lines += ["", f"### {cell}, {dtype}", "", *table(heads, rows)]
    return lines


def _row(result: Result, cell: str, results: list[Result]) -> list[str]:
    case, found = result.case, result.cells.get(cell, {})
    begin = [case.label, str(case.tp), result.transformers]
    if error := result.error or str(found.get("error", "")):
        return [*begin, error, "", "", "", "", "", ""]
    if not found.get("samples"):
        return []
    device = summary(found, "device")
    floors = [other for other in results if other.case.backend == "floor" and _beside(other, result)]
    floor = next((other.cells[cell] for other in floors if other.cells.get(cell, {}).get("samples")), None)
    times = f"{device[0] / summary(floor, 'device')[0]:.2f}" if floor is not None else ""
    figures = [_spread(device), times, _spread(summary(found, "host"))]
    if found.get("launches"):
        kernels, busy, launches = (float(str(found[name])) for name in ("kernels", "busy", "launches"))
        figures += [f"{kernels:.2f}", f"{max(0.0, device[0] - busy):.2f}", f"{launches:.0f}", f"{_mib(found):.0f}"]
    else:
        figures += [str(found.get("profile error", "")), "", "", ""]
    if note := found.get("not one graph"):
        begin[0] += f" (graph breaks: {str(note)[:80]})"
    return [*begin, *figures]


def _beside(one: Result, other: Result) -> bool:
    return (one.case.tp, one.case.dtype) == (other.case.tp, other.case.dtype)


def summary(found: Reply, name: str) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of the samples of a cell."""
    samples = found["samples"]
    assert isinstance(samples, list)
    values = [float(sample[name]) for sample in samples]
    tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return median(values), tenths[0], tenths[-1]


def _mib(found: Reply) -> float:
    return float(str(found["memory"])) / MIB


def _spread(values: tuple[float, float, float]) -> str:
    middle, low, high = values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
