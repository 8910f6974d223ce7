"""A worker from outside: requests are lines of JSON, answered one at a time."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
Reply = dict[str, object]


class Process:
    """A process that reads requests from its standard input, and writes an answer to each to its standard output.

    Args:
        command: what is run, in the root of the repository.
        environment: all of its variables.
        log: where its standard error goes, whose last line explains a sudden end.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, **request: object) -> Reply:
        """Send a request, and wait for the answer."""
        self.send(**request)
        return self.answer()

    def send(self, **request: object) -> None:
        """Send a request. Where nobody is there any more, the answer says so."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            self._lines.put("")

    def answer(self, seconds: float | None = None) -> Reply:
        """The next answer; `{"error": ...}` when the process ends first, or nothing comes in time."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return {"error": f"no answer within {seconds:.0f} s"}
        if not line:
            code = self._process.wait()
            said = self.log.read_text(errors="replace").strip().splitlines()
            return {"error": f"the process ended with code {code}: {said[-1] if said else ''}"[:300]}
        reply: Reply = json.loads(line)
        return reply

    def close(self, seconds: float = 20.0) -> None:
        """End the process: it is asked to, and after some seconds made to."""
        if self._process.stdin is not None and self._process.poll() is None:
            self._process.stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")
