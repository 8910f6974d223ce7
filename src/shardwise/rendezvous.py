"""Before a collective verb starts: whether every rank has called it. A rank that never comes is an error, not a hang."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from shardwise.errors import MeshError, MismatchError, MissingRankError, describe, ranks_in_words

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DEFAULT_TIMEOUT = 10.0
"""Seconds that a rank waits for the others to make the same call."""

START_TIMEOUT = 300.0
"""Seconds that a rank waits for the others to load or build a model: one may first have to prepare the data for all."""

PATIENCE = 2.0
"""Seconds that a rank waits for words which it can do without."""

_POLL_SECONDS = 0.005


def meeting_place(timeout: float = START_TIMEOUT) -> tuple[Store, int, int]:
    """The key-value store that the environment's variables name (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: what torchrun
    sets), this process's rank, and the number of ranks.

    Raises `MeshError` for variables that are wrong, and `MissingRankError` where not all ranks have come within `timeout`
    seconds.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if not 0 <= rank < size:
        raise _wrong_variable(f"RANK={rank} is none of the WORLD_SIZE={size} ranks, which count from 0")
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except dist.DistNetworkError as error:
        raise _wrong_variable(f"rank {rank} cannot meet the others", why=str(error)) from error
    except dist.DistStoreError as error:
        raise MissingRankError(
            describe(
                f"The start of the process group: after {timeout:g} s, not all of the {size} ranks have come.",
                why=str(error),
                either=["start all of them: torchrun does, or", "WORLD_SIZE says more than have been started"],
            )
        ) from error
    except ValueError as error:
        raise _wrong_variable(str(error)) from error
    return store, rank, size


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise _wrong_variable(f"{name}={os.environ[name]!r} is no number") from error


def _wrong_variable(problem: str, **facts: str) -> MeshError:
    return MeshError(
        describe(
            f"The start of the process group: {problem}.",
            **facts,
            environment=", ".join(f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ),
            either=["start with torchrun --nproc-per-node N script.py, which sets them, or", "correct these variables"],
        )
    )


_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def meet(mesh: DeviceMesh, what: str, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Wait until every rank of `mesh` has called `what` as often as this one. Raises as `meet_ranks`, and `MeshError` where
    the process group of `mesh` has been destroyed.
    """
    try:
        ranks = dist.get_process_group_ranks(mesh.get_group())
    except (RuntimeError, ValueError, KeyError) as error:
        raise _no_group(what) from error
    meet_ranks(ranks, what, timeout)


def meet_ranks(ranks: Sequence[int], what: str, timeout: float, said: str = "") -> int:
    """Wait until all of `ranks` (of the default process group) have called `what` as often as this one; returns how often.

    Goes through the process group's key-value store, so it also answers when the others are in another collective, or gone.
    Raises `MissingRankError` after `timeout` seconds, naming the ranks that did not come; `MismatchError` where a rank came
    with another word than this one has `said`; `MeshError` where there is no default process group any more.
    """
    if not dist.is_initialized():
        raise _no_group(what)
    store = dist.distributed_c10d._get_default_store()
    prefix, mine = f"shardwise/{what}/{'-'.join(map(str, ranks))}", dist.get_rank()
    if said:  # before this rank counts as there
        store.add(f"{prefix}/{store.add(f'{prefix}/{mine}', 0) + 1}/{said}/{mine}", 1)
    turn = store.add(f"{prefix}/{mine}", 1)
    deadline, missing = time.monotonic() + timeout, list(ranks)
    while missing := [rank for rank in missing if store.add(f"{prefix}/{rank}", 0) < turn]:
        if time.monotonic() > deadline:
            store.add(f"{prefix}/{mine}", -1)
            raise _missing(what, timeout, missing, mine)
        time.sleep(_POLL_SECONDS)
    if said and (others := [rank for rank in ranks if not store.add(f"{prefix}/{turn}/{said}/{rank}", 0)]):
        raise MismatchError(
            describe(
                f"{what}: {ranks_in_words(others)} came with something else than {said}, which rank {mine} has.",
                fix="give every rank the same arguments",
            )
        )
    return turn


def say_to_all(ranks: Sequence[int], topic: str, words: str, patience: float = PATIENCE) -> dict[int, str]:
    """Leave `words` for the others of `ranks`, and return what each has left at its call of the same number, in the order of
    ranks. One that does not come within `patience` seconds is left out: it finds these words there.
    """
    store, mine = dist.distributed_c10d._get_default_store(), dist.get_rank()
    prefix = f"shardwise/{topic}/{'-'.join(map(str, ranks))}"
    turn = store.add(f"{prefix}/{mine}", 1)
    store.set(f"{prefix}/{mine}/{turn}", words)
    if turn > 2:
        store.delete_key(f"{prefix}/{mine}/{turn - 2}")
    keys = {rank: f"{prefix}/{rank}/{turn}" for rank in ranks}
    with suppress(dist.DistStoreError):
        store.wait(list(keys.values()), timedelta(seconds=patience))
    heard = {rank: store.get(key).decode() for rank, key in keys.items() if rank != mine and store.check([key])}
    return {rank: words if rank == mine else heard[rank] for rank in ranks if rank == mine or rank in heard}


def _no_group(what: str) -> MeshError:
    return MeshError(
        describe(
            f"{what}: the process group on which the model lies is gone.",
            why="dist.destroy_process_group() was called, and what one rank does here needs all of them",
            fix=f"call {what} before destroy_process_group()",
        )
    )


def _missing(what: str, timeout: float, missing: list[int], mine: int) -> MissingRankError:
    absent = ", ".join(map(str, missing))
    return MissingRankError(
        describe(
            f"{what}: after {timeout:g} s, rank {absent} had not called it; rank {mine} had.",
            why="what one rank does here needs all of them, so every rank must make this call",
            either=["take it out of `if rank == 0:`, or", "if a rank is only late, give it more time: timeout=..."],
        )
    )
