"""Start the ranks of a command as processes of our own, as torchrun would, and watch them until the last has ended."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGABRT, Signals
from types import TracebackType

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but missing in __all__

from shardwise.errors import MeshError, ShardwiseError, describe, ranks_in_words
from shardwise.mesh import started_ranks

UNMET = 3
"""Exit code of a rank that ran to its end and whose answer is no. Any other code but 0 means that the rank failed."""

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0
_SHOWN_LINES = 40
# What a rank says when another one is gone: a consequence, never the cause.
_ECHOES = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "and so it does here")


class WorkerError(ShardwiseError, RuntimeError):
    """A rank that ended with an error, was killed, or did not end in time. The message shows what it wrote last."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


def launched() -> bool:
    """Whether this process is one rank of several already: torchrun, or `run_as_ranks`, has set the variables."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def asked_size(size: int | None) -> int:
    """Ranks of a command: `size`, or without it, as many as torchrun has started, or 2."""
    return size if size is not None else started_ranks(otherwise=2)


def check_size(size: int) -> None:
    """Raise `MeshError` where torchrun has started another number of processes than `size`, which a command was asked for."""
    if (started := started_ranks(otherwise=1)) != size:
        raise MeshError(
            describe(
                f"--tp {size} was asked for, and {started} processes have been started.",
                either=["leave --tp out, or", f"torchrun --nproc-per-node {size}"],
            )
        )


def run_as_ranks(
    command: Sequence[str], size: int, *, timeout: float, environment: Mapping[str, str] | None = None, show: bool = True
) -> int:
    """Run `command` as `size` processes that find each other as under torchrun, and return when all have ended.

    Each computes on one thread. A rank that fails ends the others, after a few seconds in which they may fail by themselves.
    The command should call `follow_parent` first, so that no rank survives this process.

    Args:
        command: a program and its arguments.
        size: number of ranks.
        timeout: seconds; ranks that still run then are asked where they are, and ended.
        environment: variables to set besides torchrun's.
        show: let rank 0 write to this process's standard output. What ranks write otherwise is kept for the error message.

    Returns 0, or `UNMET` where a rank ended with it. Raises `WorkerError` for any other end.
    """
    with Workers(command, size, environment or {}, show) as workers:
        return workers.watch(timeout)


def follow_parent() -> None:
    """End this process as soon as the one that started it through `run_as_ranks` is gone, however that went."""

    def follow() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever written: this returns when the other end closes
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def saying_why() -> Iterator[None]:
    """Inside, what shardwise raises on purpose ends this process by its message alone: a traceback would hide it."""
    try:
        yield
    except ShardwiseError as error:
        sys.exit(f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    said: Path


class Workers:
    """The processes of one `run_as_ranks`, as a context: none is left when it ends."""

    def __init__(self, command: Sequence[str], size: int, environment: Mapping[str, str], show: bool) -> None:
        self._command, self._size, self._environment, self._show = list(command), size, dict(environment), show
        self._workers: list[_Worker] = []
        self._stack = ExitStack()

    def __enter__(self) -> Workers:
        try:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="shardwise-")))
            # Held here, as torchrun's agent does, on a port that the system chooses: no race for a free one.
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            for rank in range(self._size):
                self._workers.append(self._start(rank, folder / f"rank{rank}.txt"))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._end()

    def watch(self, timeout: float) -> int:
        """Wait for the ranks; as `run_as_ranks`."""
        deadline, failed = time.monotonic() + timeout, False
        first: list[int] = []
        while (running := [r for r, w in enumerate(self._workers) if w.process.poll() is None]) and time.monotonic() < deadline:
            first += [rank for rank in self._failed() if rank not in first]
            if first and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + _GRACE_SECONDS)
            time.sleep(_POLL_SECONDS)
        first += [rank for rank in self._failed() if rank not in first]
        if first:
            raise self._failure(first, running)
        if running:
            raise self._late(running, timeout)
        return UNMET if any(worker.process.returncode == UNMET for worker in self._workers) else 0

    def _start(self, rank: int, said: Path) -> _Worker:
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._size),
            "LOCAL_WORLD_SIZE": str(self._size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        with said.open("wb") as file:
            process = subprocess.Popen(
                self._command,
                env={**os.environ, **variables, **self._environment},
                stdin=subprocess.PIPE,
                stdout=None if self._show and rank == 0 else file,
                stderr=file,
            )
        return _Worker(process, said)

    def _failed(self) -> list[int]:
        return [rank for rank, worker in enumerate(self._workers) if worker.process.poll() not in (None, 0, UNMET)]

    def _failure(self, failed: list[int], running: list[int]) -> WorkerError:
        said = {rank: self._said(rank) for rank in failed}
        rank = next((rank for rank in failed if not any(echo in said[rank] for echo in _ECHOES)), failed[0])
        lines = [f"rank {rank} of {self._size} {_end_of(self._workers[rank].process.returncode)}"]
        if others := sorted(set(failed) - {rank}):
            lines.append(f"  {ranks_in_words(others)} failed too, later or because of it")
        if running:
            lines.append(f"  {ranks_in_words(running)} did not finish")
        return WorkerError("\n".join([*lines, f"--- rank {rank} ---", said[rank]]), rank)

    def _late(self, running: list[int], timeout: float) -> WorkerError:
        for rank in running:
            self._workers[rank].process.send_signal(SIGABRT)  # faulthandler writes where every thread stands
        for rank in running:
            self._wait(rank)
        lines = [f"{ranks_in_words(running)} of {self._size} did not end within {timeout:g} s"]
        for rank in running:
            lines += [f"--- rank {rank} ---", self._said(rank)]
        return WorkerError("\n".join(lines), running[0])

    def _said(self, rank: int) -> str:
        lines = self._workers[rank].said.read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-_SHOWN_LINES:]) or "(it wrote nothing)"

    def _wait(self, rank: int) -> None:
        try:
            self._workers[rank].process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._workers[rank].process.kill()
            self._workers[rank].process.wait()

    def _end(self) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.terminate()
        for rank, worker in enumerate(self._workers):
            self._wait(rank)
            if worker.process.stdin is not None:
                worker.process.stdin.close()
        self._stack.close()


def _end_of(code: int) -> str:
    return f"was killed by {Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
