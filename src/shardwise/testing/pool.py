"""`RankPool`: worker processes that are the ranks of one process group, and run one function after the other."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but missing in __all__

from shardwise.errors import MismatchError
from shardwise.testing.failures import Failure, rank_error, timeout_error
from shardwise.testing.worker import Job, Reply, dump, work

R = TypeVar("R")

# Seconds for the processes to come up: mostly imports, on a machine that may be busy.
_START = 300.0


@dataclass(frozen=True, slots=True)
class _Worker:
    process: BaseProcess
    channel: Connection
    stacks: Path


class RankPool:
    """`size` worker processes, each with one thread, as the ranks of one default process group.

    Started by the first `run`, and again by the next one after a failure that left the ranks out of step. Each process has
    torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, ...) on a port that was free, so pools live
    side by side. What a function leaves behind in its process (imports, groups, class attributes) the next one finds.

    Args:
        size: number of ranks.
        timeout: seconds that one `run` may take, unless it is given its own.
        backend: of the default process group; None starts the processes without one.
        device: "cpu", or "cuda": rank r computes on GPU r, modulo their number (ranks that share one need gloo). With "cpu" the
            processes see no GPU, so that what chooses a device by itself chooses the CPU.
        grace: seconds that the others may still take once a rank has failed. They mostly fail for the same reason, or wait for
            the failed rank for ever.
        start_method: multiprocessing's. "spawn": each process starts Python anew, as torchrun's do, which costs each several
            seconds of imports. "forkserver": they are forked from one that has what
            `multiprocessing.set_forkserver_preload` names, and come up at once; sets of strings are then in the same order on
            all ranks, as they need not be elsewhere. Not with "cuda".
    """

    def __init__(
        self,
        size: int,
        *,
        timeout: float = 120.0,
        backend: str | None = "gloo",
        device: str = "cpu",
        grace: float = 3.0,
        start_method: str = "spawn",
    ) -> None:
        self.size = size
        self.timeout = timeout
        self.backend = backend
        self.device = device
        self.grace = grace
        self.start_method = start_method
        self._workers: list[_Worker] = []
        self._store: TCPStore | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def run(
        self, fn: Callable[..., R], *args: object, timeout: float | None = None, fresh: bool = False, **kwargs: object
    ) -> list[R]:
        """Call `fn(*args, **kwargs)` on every rank, and return the results in rank order.

        Args:
            fn: a function of a module (workers import it by name); arguments and results must be picklable. Tensors arrive as
                CPU copies. torch's random generator starts at the rank's number, so ranks draw different numbers.
            timeout: seconds, instead of the pool's own.
            fresh: in newly started processes.

        Raises `RankError` where a rank raised or died (its exception is the `__cause__`), `RankTimeoutError` where ranks hang,
        and `MismatchError` where all returned, but after different numbers of collective calls.
        """
        if fresh:
            self.close()
        replies = self._call(Job(fn, args, kwargs), self.timeout if timeout is None else timeout)
        return [cast(R, reply.result) for reply in replies]

    def close(self) -> None:
        """End the processes. The pool may be used again: the next `run` starts new ones."""
        for worker in self._workers:
            worker.channel.close()  # the worker's signal to leave
        deadline = time.monotonic() + 1.0
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []
        self._store = None
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _call(self, job: Job, timeout: float) -> list[Reply]:
        body = dump(job)
        if not all(worker.process.is_alive() for worker in self._workers):
            self.close()
        if not self._workers:
            self._start()
        message = dump((sys.path, body))
        for worker in self._workers:
            worker.channel.send_bytes(message)
        return self._replies(timeout)

    def _start(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="shardwise-ranks-")
        # The parent holds the store, as torchrun's agent does, on a port that the system chooses: no race for a free one.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context: Any = multiprocessing.get_context(self.start_method)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            stacks = Path(self._directory.name, f"rank{rank}.txt")
            variables = _torchrun_variables(rank, self.size, self._store.port) | _visible(self.device)
            process = context.Process(
                target=work,
                args=(theirs, rank, self.size, self.backend, self.device, str(stacks), variables),
                name=f"rank{rank}",
                daemon=True,
            )
            with _environment(variables):  # before it imports anything
                process.start()
            theirs.close()  # so that the end of the worker is the end of the channel
            self._workers.append(_Worker(process, ours, stacks))
        try:
            self._replies(_START)
        except BaseException:
            self.close()
            raise

    def _replies(self, timeout: float) -> list[Reply]:
        try:
            replies, dead = self._collect(timeout)
        except BaseException:  # Ctrl-C, or a result that cannot be unpickled: replies of this call would answer the next one
            self.close()
            raise
        failures = dead | {rank: reply.failure for rank, reply in replies.items() if reply.failure is not None}
        silent = [rank for rank in range(self.size) if rank not in replies and rank not in dead]
        calls = [replies[rank].calls if rank in replies else None for rank in range(self.size)]
        stacks = self._stacks(silent) if silent and not failures else {}
        if silent or dead or len(set(calls)) > 1 or (self._counts and None in calls):
            self.close()
        if failures:
            raise rank_error(failures, self.size, silent)
        if silent:
            raise timeout_error(stacks, self.size, timeout)
        if len(set(calls)) > 1:
            raise MismatchError(f"the ranks returned after different numbers of collective calls: {calls}, in rank order.")
        return [replies[rank] for rank in range(self.size)]

    @property
    def _counts(self) -> bool:
        """Whether the backend's collectives are counted."""
        return self.backend is not None and (self.backend == "gloo" or "shm" in self.backend)

    def _collect(self, timeout: float) -> tuple[dict[int, Reply], dict[int, Failure]]:
        replies: dict[int, Reply] = {}
        dead: dict[int, Failure] = {}
        waiting = {worker.channel: rank for rank, worker in enumerate(self._workers)}
        deadline = time.monotonic() + timeout
        failed = False
        while waiting and (left := deadline - time.monotonic()) > 0:
            for channel in wait(list(waiting), left):
                rank = waiting.pop(cast(Connection, channel))
                try:
                    replies[rank] = pickle.loads(self._workers[rank].channel.recv_bytes())
                except (EOFError, ConnectionError):
                    dead[rank] = self._death(rank)
            if not failed and (dead or any(reply.failure for reply in replies.values())):
                failed = True
                deadline = min(deadline, time.monotonic() + self.grace)
        return replies, dead

    def _death(self, rank: int) -> Failure:
        noticed = time.monotonic()
        process = self._workers[rank].process
        process.join(5.0)
        code = process.exitcode
        if code is not None and code < 0:
            return Failure(noticed, f"died: killed by {signal.Signals(-code).name}")
        return Failure(noticed, f"died: its process ended with exit code {code}")

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        ready = [self._workers[rank] for rank in ranks if self._workers[rank].stacks.exists()]
        for worker in ready:  # the others have not come so far that they would survive the signal
            os.kill(worker.process.pid or 0, signal.SIGUSR1)
        deadline = time.monotonic() + 2.0
        texts = [""] * len(ready)
        while time.monotonic() < deadline:
            time.sleep(0.1)
            earlier, texts = texts, [worker.stacks.read_text() for worker in ready]
            if all(texts) and texts == earlier:
                break
        said = dict(zip((worker.process.name for worker in ready), texts, strict=True))
        return {rank: said.get(f"rank{rank}") or "(its process did not say where it is)" for rank in ranks}


def run_ranks(fn: Callable[..., R], size: int, *args: object, timeout: float = 120.0, **kwargs: object) -> list[R]:
    """Call `fn(*args, **kwargs)` on `size` new gloo processes, and return the results in rank order. See `RankPool.run`."""
    with RankPool(size, timeout=timeout) as pool:
        return [cast(R, reply.result) for reply in pool._call(Job(fn, args, kwargs), timeout)]


def _torchrun_variables(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }


def _visible(device: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""} if device == "cpu" else {}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    earlier = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
