"""`run_threads`: all ranks in this process, on torch's threaded process group: a private API, used here and nowhere else."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.distributed as dist
from torch._C._distributed_c10d import (  # type: ignore[attr-defined]  # missing in torch's stub
    HashStore,
    _set_thread_isolation_mode,
)
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from shardwise.testing.failures import Failure, rank_error, timeout_error

R = TypeVar("R")

# Once a rank has failed, how long the others may take to notice, in seconds: those in a collective do at once.
_GRACE = 1.0


def run_threads(fn: Callable[..., R], size: int, *args: object, timeout: float = 60.0, **kwargs: object) -> list[R]:
    """Call `fn(*args, **kwargs)` on `size` threads that are the ranks of one default process group; the results in rank order.

    Everything is on the CPU and nothing is copied: ranks share the arguments, the results and torch's random generator.
    Backward runs in the rank's own thread, so collectives may be called there. Supported: all_reduce, all_gather(_into_tensor),
    reduce_scatter(_tensor), broadcast, scatter, gather, all_to_all(_single), barrier, `init_device_mesh` and sub-groups.

    Raises `RankError` where a rank raised (its exception is the `__cause__`), and `RankTimeoutError` where ranks did not return
    within `timeout` seconds; their threads end when what they wait for does. What may hang for good belongs in a `RankPool`.
    """
    results: dict[int, R] = {}
    failures: dict[int, Failure] = {}
    store = HashStore()
    over = threading.Event()

    def rank_main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            results[rank] = fn(*args, **kwargs)
        except BaseException as error:  # SystemExit too: the group's word that another rank has failed
            if not over.is_set():
                failures[rank] = Failure.of(error)
                _release()
        finally:
            if not over.is_set() and dist.is_initialized():
                dist.destroy_process_group()

    threads = [threading.Thread(target=rank_main, args=(rank,), name=f"rank{rank}", daemon=True) for rank in range(size)]
    with _threaded_world():
        for thread in threads:
            thread.start()
        silent = _join(threads, failures, timeout)
        over.set()
        _stop(threads)
    if failures:
        raise rank_error(failures, size, sorted(silent))
    if silent:
        raise timeout_error(silent, size, timeout)
    return [results[rank] for rank in range(size)]


def _join(threads: list[threading.Thread], failures: dict[int, Failure], timeout: float) -> dict[int, str]:
    """Wait for the threads; where those stand, by rank, that never came back."""
    deadline = time.monotonic() + timeout
    failed = False
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        for thread in threads:
            thread.join(0.05)
        if failures and not failed:
            failed = True
            deadline = min(deadline, time.monotonic() + _GRACE)
    frames = sys._current_frames()
    silent = {
        rank: "".join(traceback.format_stack(frames[thread.ident]))
        for rank, thread in enumerate(threads)
        if thread.is_alive() and thread.ident in frames
    }
    if silent and not failures:
        _release()
        for thread in threads:
            thread.join(_GRACE)
        failures.clear()  # what the released ranks then raised is no cause
    return silent


def _stop(threads: list[threading.Thread]) -> None:
    """Have the threads that are left end at their next line: they must not wander into the collectives of a later call."""
    for thread in threads:
        if thread.is_alive() and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def _release() -> None:
    """Wake the ranks that wait in a collective; each leaves it by SystemExit."""
    group = threaded.ProcessLocalGroup
    with group._coll_lock:
        group.exception_handle(None)


def within_threads() -> bool:
    """Whether this process runs ranks on threads already: `run_threads` can't be called then."""
    return isinstance(dist.distributed_c10d._world, cast(type, threaded.ThreadLocalWorld))


@contextmanager
def _threaded_world() -> Iterator[None]:
    if within_threads():
        raise RuntimeError("run_threads cannot be called from within itself: torch has one threaded process group at a time.")
    hook = sys.excepthook  # which each rank's start replaces by one that puts its number in front of errors
    _set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        yield
    finally:
        sys.excepthook = hook
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        _set_thread_isolation_mode(False)
