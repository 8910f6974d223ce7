"""Before a collective verb starts: whether every rank has called it. A rank that never comes is an error, not a hang."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from shardwise.errors import MeshError, MismatchError, MissingRankError, describe, ranks_in_words

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DEFAULT_TIMEOUT = 10.0
"""Seconds that a rank waits for the others to make the same call."""

START_TIMEOUT = 300.0
"""Seconds that a rank waits for the others to load or build a model: one may first have to prepare the data for all."""

_POLL_SECONDS = 0.005


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
