"""The ranks of one contender, from outside."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from benchmarks.contenders import Contender
from benchmarks.process import ROOT, Process, Reply
from benchmarks.workload import Ranks

GRACE = 30.0
"""Seconds that the other ranks have when one has failed: they may wait for it in a collective."""


class Group:
    """As many processes as the contender has ranks. What goes wrong is in `error`, and then nothing more is asked of it."""

    def __init__(self, contender: Contender, ranks: Ranks, python: Path, logs: Path) -> None:
        self.contender = contender
        self.error = ""
        self.versions: dict[str, str] = {}
        count = 1 if ranks.fake or contender.alone else ranks.size
        port = _free_port()
        self._processes: list[Process] = []
        for rank in range(count):
            kind = "fake" if ranks.fake else "processes"
            words = [contender.adapter, str(ranks.size), kind, str(contender.threads)]
            environment = _environment(contender, rank, ranks.size, port)
            log = logs / f"{contender.name}-{kind}-{ranks.size}-{rank}.txt"
            self._processes.append(Process([str(python), "-m", "benchmarks.worker", *words], environment, log))

    def meet(self, seconds: float) -> None:
        """Wait for all to have started."""
        replies = self._answers(seconds)
        versions = replies[0].get("versions")
        self.versions = versions if isinstance(versions, dict) else {}

    def ask(self, seconds: float, **request: object) -> list[Reply]:
        """What each rank answers. When one fails, `error` says how, and all are ended if the others wait for it in vain."""
        for process in self._processes:
            process.send(**request)
        return self._answers(seconds)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.close(3.0 if self.error else 20.0)

    def _answers(self, seconds: float) -> list[Reply]:
        """Every rank's, failures first noted; `stuck` groups are of no further use."""
        self.error, until, replies = "", time.monotonic() + seconds, []
        for process in self._processes:
            left = GRACE if self.error else max(1.0, until - time.monotonic())
            replies.append(process.answer(left))
            self.error = self.error or str(replies[-1].get("error", ""))
        return replies


def _environment(contender: Contender, rank: int, size: int, port: int) -> dict[str, str]:
    """Of one rank: torchrun's variables, unless the contender is alone; no threads but those that it computes with."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    here = not contender.environment.packages
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")] if here else []
    found = inherited | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, paths)]),
        "OMP_NUM_THREADS": str(contender.threads),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not contender.alone:
        found |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return found | contender.variables


def _free_port() -> int:
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return int(there.getsockname()[1])
