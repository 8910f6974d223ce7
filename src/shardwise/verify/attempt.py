"""Collective code that all ranks try, and that may raise on all of them (unlike `shardwise.replicas.together`, whose code is
not collective, and may raise on some).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from shardwise.errors import MissingRankError
from shardwise.rendezvous import meet_ranks

T = TypeVar("T")

_SECONDS = 10.0


@dataclass(frozen=True)
class Raised:
    """What all ranks raised together, and in which phase."""

    phase: str
    message: str


def attempt(phase: str, run: Callable[[], T], seconds: float = _SECONDS) -> T | Raised:
    """What `run` gives, or what it raised, where it did on all ranks. Collective, then. Raises what only some ranks raised:
    after some `seconds`, in which the others do not come.
    """
    try:
        return run()
    except Exception as error:
        try:
            meet_ranks(range(dist.get_world_size()), f"verify: {phase} failed", seconds)
        except MissingRankError:
            raise error from None
        return Raised(phase, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
