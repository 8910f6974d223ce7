"""`shardwise.verify` on the ranks of a pool, and the search alone, which must find nothing in a sound model."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

import shardwise
from shardwise.mesh import tp_mesh
from shardwise.quiet import quiet
from shardwise.rendezvous import meet_ranks
from shardwise.verify import Culprit, Verification
from shardwise.verify.one import one_process
from shardwise.verify.settings import Settings

# `shardwise.verify`, the attribute, is the function.
run, search = (importlib.import_module(f"shardwise.verify.{name}") for name in ("run", "search"))


@contextmanager
def one_process_here():
    """The one process is this one: starting another takes seconds."""
    with (
        patch("shardwise.verify.run.in_own_process", one_process),
        patch("shardwise.verify.search.in_own_process", one_process),
    ):
        yield


def verify_here(model: str, **options: object) -> Verification:
    """On a rank of a pool: as if torchrun had started it."""
    with one_process_here():
        return shardwise.verify(model, random=True, imports=("broken_styles",), **options)


def search_here(model: str, folder: Path, number: int = 0, **options: object) -> Culprit | None:
    """On a rank of a pool: the search alone."""
    settings = Settings(model, random=True, folder=str(folder), **options)
    with one_process_here(), quiet():
        tp_mesh(settings.tp, None, settings.ep)
        if dist.get_rank() == 0:
            one_process(settings, "one")
        meet_ranks(range(dist.get_world_size()), "the test's model", 100)
        return search.find_culprit(settings, number)
