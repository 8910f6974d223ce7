"""The processes of the backends from outside: prepared side by side, measured one at a time, in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.steps import CELLS

ROOT = Path(__file__).parents[2]
Reply = dict[str, object]
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


class Process:
    """A worker, started by `prepare`."""

    def __init__(self, case: Case, options: Options, folder: Path) -> None:
        self.result = Result(case)
        self.options = options
        self.log = folder / "logs" / f"{case.name}.txt"
        self._process: subprocess.Popen[str] | None = None

    def prepare(self, until: float) -> None:
        """Start, and make each cell ready; what fails, or would be compiled after `until`, is noted and left out."""
        self._process = self._start()
        started = self._answer()
        self.result.transformers = str(started.get("transformers", ""))
        self.result.error = str(started.get("error", ""))
        if self.result.case.site not in (None, started.get("site")) and not self.result.error:
            self.result.error = f"transformers came from {started.get('site')}, not from {self.result.case.site}"
        for cell in self.options.cells if not self.result.error else ():
            late = time.monotonic() > until and not cell.endswith("eager")
            reply = {"error": LATE} if late else self.ask(do="prepare", cell=cell)
            self.result.cells[cell] = {**reply, "samples": []}
            print(f"  {self.result.case.name}: {cell}: {_said(reply)}", flush=True)
        if self.result.error:
            print(f"  {self.result.case.name}: {self.result.error}", flush=True)

    def _start(self) -> subprocess.Popen[str]:
        case, options = self.result.case, self.options
        paths = [path for path in (case.site, str(ROOT / "src"), os.environ.get("PYTHONPATH")) if path]
        changes = {"PYTHONPATH": os.pathsep.join(paths), "TORCHINDUCTOR_COMPILE_THREADS": str(options.threads)}
        arguments = [case.backend, str(case.tp), case.dtype, options.device, options.size]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.worker", *arguments],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **changes},
            )

    def ready(self) -> list[str]:
        """The cells that can be measured."""
        return [cell for cell, found in self.result.cells.items() if "error" not in found]

    def round(self, cell: str, runs: int) -> None:
        """Some more samples of a cell."""
        reply, found = self.ask(do="round", cell=cell, runs=runs), self.result.cells[cell]
        if "error" in reply:
            found["error"] = reply["error"]
        else:
            found["samples"] += reply["samples"]  # type: ignore[operator]  # lists, as written above

    def profile(self, cell: str, trace: Path | None) -> None:
        """Kernels and memory of a cell."""
        found = self.ask(do="profile", cell=cell, trace=str(trace) if trace else None)
        self.result.cells[cell] |= {"profile error": found["error"]} if "error" in found else found

    def ask(self, **request: object) -> Reply:
        """Send a request, and wait for the answer."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            return self._gone()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        if self._process.stdin is not None and self._process.poll() is None:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> Reply:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return self._gone()
        reply: Reply = json.loads(line)
        return reply

    def _gone(self) -> Reply:
        assert self._process is not None
        code = self._process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return {"error": f"the process ended with code {code}: {lines[-1] if lines else ''}"[:300]}


def run(
    cases: Iterable[Case], options: Options, folder: Path, until: float, save: Callable[[list[Result]], None]
) -> list[Result]:
    """Measure some cases side by side; they are alive at the same time, so that their rounds can take turns.

    `save` is given what is there, again and again.
    """
    processes = [Process(case, options, folder) for case in cases]
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
