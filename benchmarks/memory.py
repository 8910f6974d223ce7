"""Memory of this process while something runs, as the kernel counts it, watched from another process.

`python -m benchmarks.memory PID` is that process: it looks until its standard input ends, then says the most it saw.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

INTERVAL = 0.002
"""Seconds between two looks."""

Sizes = dict[str, int]


def sizes(process: int | str = "self") -> Sizes:
    """Bytes: `RssAnon` of memory of its own, `RssFile` of pages of mapped files, `rchar` asked for with read()."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssFile:"))}
    line = Path(f"/proc/{process}/io").read_text().splitlines()[0]
    return found | {"rchar": int(line.split()[1])}


class Watch:
    """A `with` block whose memory is watched: `before`, `most` and `after`, the last without what was freed."""

    before: Sizes
    most: Sizes
    after: Sizes

    def __enter__(self) -> Watch:
        settle()
        command = [sys.executable, "-S", "-E", str(Path(__file__)), str(os.getpid())]
        self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._watcher.stdout is not None
        self._watcher.stdout.readline()  # it has begun
        self.before = sizes()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        said, _ = self._watcher.communicate("")
        settle()
        self.after = sizes()
        seen: Sizes = json.loads(said)
        self.most = {name: max(seen[name], self.before[name]) for name in seen}


def settle() -> None:
    """Give back to the kernel what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main(process: int) -> None:
    """Look again and again."""
    most = sizes(process)
    print(flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        seen = sizes(process)
        most = {name: max(most[name], seen[name]) for name in seen}
        time.sleep(INTERVAL)
    print(json.dumps(most))


if __name__ == "__main__":
    main(int(sys.argv[1]))
