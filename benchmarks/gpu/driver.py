"""The processes of the backends from outside: prepared side by side, measured one at a time, in turns."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.steps import CELLS
from benchmarks.process import ROOT, Process, Reply

LATE = "left out: the time was up"


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Args:
        jobs: cases that are built and compiled at a time.
        threads: with which each compiles.
        rounds: turns that every cell gets, with `runs` runs in each.
    """

    device: str
    size: str
    jobs: int
    threads: int
    rounds: int
    runs: int
    cells: tuple[str, ...] = CELLS


@dataclass(frozen=True)
class Case:
    """A backend at a size of the axis and in a dtype; `site` is a folder whose packages go before the installed ones."""

    label: str
    backend: str
    tp: int
    dtype: str
    site: str | None = None

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.label}-tp{self.tp}-{self.dtype}"


@dataclass
class Result:
    """What was found of one case, by cell."""

    case: Case
    transformers: str = ""
    error: str = ""
    cells: dict[str, Reply] = field(default_factory=dict)


class Prepared:
    """A case with its process, started by `prepare`."""

    def __init__(self, case: Case, options: Options, folder: Path) -> None:
        self.result = Result(case)
        self.options = options
        self.log = folder / "logs" / f"{case.name}.txt"
        self._process: Process | None = None

    def prepare(self, until: float) -> None:
        """Start, and make each cell ready; what fails, or would be compiled after `until`, is noted and left out."""
        self._process = self._start()
        started = self._process.answer()
        self.result.transformers = str(started.get("transformers", ""))
        self.result.error = str(started.get("error", ""))
        if self.result.case.site not in (None, started.get("site")) and not self.result.error:
            self.result.error = f"transformers came from {started.get('site')}, not from {self.result.case.site}"
        for cell in self.options.cells if not self.result.error else ():
            late = time.monotonic() > until and not cell.endswith("eager")
            reply = {"error": LATE} if late else self._process.ask(do="prepare", cell=cell)
            self.result.cells[cell] = {**reply, "samples": []}
            print(f"  {self.result.case.name}: {cell}: {_said(reply)}", flush=True)
        if self.result.error:
            print(f"  {self.result.case.name}: {self.result.error}", flush=True)

    def _start(self) -> Process:
        case, options = self.result.case, self.options
        paths = [path for path in (case.site, str(ROOT / "src"), os.environ.get("PYTHONPATH")) if path]
        changes = {"PYTHONPATH": os.pathsep.join(paths), "TORCHINDUCTOR_COMPILE_THREADS": str(options.threads)}
        arguments = [case.backend, str(case.tp), case.dtype, options.device, options.size]
        command = [sys.executable, "-m", "benchmarks.gpu.worker", *arguments]
        return Process(command, {**os.environ, **changes}, self.log)

    def ready(self) -> list[str]:
        """The cells that can be measured."""
        return [cell for cell, found in self.result.cells.items() if "error" not in found]

    def round(self, cell: str, runs: int) -> None:
        """Some more samples of a cell."""
        assert self._process is not None
        reply, found = self._process.ask(do="round", cell=cell, runs=runs), self.result.cells[cell]
        if "error" in reply:
            found["error"] = reply["error"]
        else:
            found["samples"] += reply["samples"]  # type: ignore[operator]  # lists, as written above

    def profile(self, cell: str, trace: Path | None) -> None:
        """Kernels and memory of a cell."""
        assert self._process is not None
        found = self._process.ask(do="profile", cell=cell, trace=str(trace) if trace else None)
        self.result.cells[cell] |= {"profile error": found["error"]} if "error" in found else found

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()


def run(
    cases: Iterable[Case], options: Options, folder: Path, until: float, save: Callable[[list[Result]], None]
) -> list[Result]:
    """Measure some cases side by side; they are alive at the same time, so that their rounds can take turns.

    `save` is given what is there, again and again.
    """
    processes = [Prepared(case, options, folder) for case in cases]
    results = [process.result for process in processes]
    try:
        with ThreadPoolExecutor(options.jobs) as threads:
            list(threads.map(lambda process: process.prepare(until), processes))
        for _ in range(options.rounds):
            for process in processes:
                for cell in process.ready():
                    process.round(cell, options.runs)
            save(results)
        for process in processes:
            for cell in process.ready():
                traced = cell.startswith("train") and process.result.case.dtype == "bfloat16"
                trace = folder / f"{process.result.case.name}-{cell.replace(' ', '-')}"
                process.profile(cell, trace if traced else None)
            save(results)
    finally:
        for process in processes:
            process.close()
    return results


def _said(reply: Reply) -> str:
    if "error" in reply:
        return str(reply["error"])
    graphs = f", not one graph: {reply['not one graph']}" if reply["not one graph"] else ""
    return f"ready after {reply['seconds']:.0f} s{graphs}"
