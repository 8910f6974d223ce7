"""The worker's side of a `RankPool`: receives functions, runs them as one rank, sends back what came out.

Messages are bytes made by `dump`, so that tensors travel by value: nothing in the parent depends on the worker's memory.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing import connection, parent_process
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.shm import ShmGroup
from shardwise.testing.failures import Failure


@dataclass(frozen=True, slots=True)
class Job:
    """A call that every rank makes."""

    fn: Callable[..., object]
    args: tuple[object, ...]
    kwargs: dict[str, object]


@dataclass(frozen=True, slots=True)
class Reply:
    """What one rank made of a `Job`.

    Args:
        calls: how many collectives this rank has called on the default group so far; ranks that differ are out of step. None
            where that is not known, or the group is broken.
    """

    result: object
    failure: Failure | None
    calls: int | None


class _ByValue(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, Tensor) or type(obj) not in (Tensor, nn.Parameter) or obj.is_meta:
            return NotImplemented
        # Detached and copied: a graph cannot be sent, and a view would bring its whole storage along.
        copy = obj.detach().to("cpu", copy=True)
        value = nn.Parameter(copy, obj.requires_grad) if isinstance(obj, nn.Parameter) else copy
        return value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def dump(value: object) -> bytes:
    """`value` as bytes, with the tensors in it as detached CPU copies. Raises what pickle raises for what cannot be sent."""
    buffer = io.BytesIO()
    _ByValue(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def work(
    channel: connection.Connection,
    rank: int,
    size: int,
    backend: str | None,
    device: str,
    stacks: str,
    variables: Mapping[str, str],
) -> None:
    """A worker's life: join the default process group, then run one `Job` after the other until the parent hangs up.

    Args:
        channel: receives `dump((import path, dump(Job)))`, sends a `Reply` for each, and one for the start.
        backend: of the default process group; None starts without one.
        device: the kind on which this rank computes; of several, the one with the rank's number.
        stacks: the file into which SIGUSR1 writes where every thread stands.
        variables: of the environment, which a forked process has not got from its parent.
    """
    os.environ.update(variables)
    np.random.seed()  # a forked process would draw what the others draw
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then closes the pool
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    with open(stacks, "w") as file, contextlib.suppress(EOFError, ConnectionError):
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        channel.send_bytes(_send(_attempt(_start, backend, device, rank, size)))
        while True:
            path, body = pickle.loads(channel.recv_bytes())
            sys.path[:] = path  # before the function is unpickled: its module is imported then
            channel.send_bytes(_send(_attempt(_run, body, rank)))
    sys.stdout.flush()
    # The other ranks leave at the same moment: a backend's destructor would wait for them, or complain.
    os._exit(0)


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _start(backend: str | None, device: str, rank: int, size: int) -> None:
    if device != "cpu":
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
    for name in ("send", "recv", "isend", "irecv"):
        setattr(dist, name, _Counted(getattr(dist, name)))
    if backend is not None:
        dist.init_process_group(backend, rank=rank, world_size=size)


def _run(body: bytes, rank: int) -> object:
    job: Job = pickle.loads(body)
    torch.manual_seed(rank)
    return job.fn(*job.args, **job.kwargs)


def _attempt(fn: Callable[..., object], *args: object) -> Reply:
    try:
        return Reply(fn(*args), None, _calls())
    except BaseException as error:  # SystemExit too: a rank that leaves has failed
        return Reply(None, Failure.of(error), _calls())


def _send(reply: Reply) -> bytes:
    failure = reply.failure
    if failure is not None:
        return dump(replace(reply, failure=replace(failure, error=failure.error if _survives(failure.error) else None)))
    try:
        return dump(reply)
    except Exception as error:  # whatever a user's __reduce__ may raise
        return dump(replace(reply, result=None, failure=replace(Failure.of(error), error=None)))


def _survives(error: BaseException | None) -> bool:
    try:
        pickle.loads(dump(error))
    except Exception:  # an exception class may do anything in its constructor
        return False
    return True


class _Counted:
    """`dist.send` and the like, counting the messages on the default group: gloo numbers them as it does collectives."""

    def __init__(self, fn: Callable[..., object]) -> None:
        self._fn = fn
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        group = kwargs.get("group", args[2] if len(args) > 2 else None)
        self.calls += group is None or group is dist.distributed_c10d._get_default_group()
        return self._fn(*args, **kwargs)


def _calls() -> int | None:
    if not dist.is_initialized():
        return None
    group = dist.group.WORLD
    if isinstance(group, ShmGroup):
        return group.calls
    if dist.get_backend() != "gloo":
        return None
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    messages = sum(fn.calls for fn in (dist.send, dist.recv, dist.isend, dist.irecv) if isinstance(fn, _Counted))
    return int(backend._get_sequence_number_for_group()) - messages  # type: ignore[attr-defined]  # missing in torch's stub
