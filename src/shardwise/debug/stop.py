"""`break_on`: a breakpoint at a collective."""

from __future__ import annotations

import inspect
import os
import pdb
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from types import FrameType
from typing import Any

import torch.distributed as dist

from shardwise.debug.operators import KINDS, Call
from shardwise.debug.record import Collective
from shardwise.debug.watch import Watch
from shardwise.errors import ShardwiseError, describe

PHASES = ("forward", "backward", "recompute")


class Breakpoint:
    """A breakpoint at collectives, from `break_on`. Removed by `remove()`, or at the end of its `with` block."""

    def __init__(self, module: str, op: str | None, rank: int | None, phase: str | None) -> None:
        self.module, self.op, self.rank, self.phase = module, op, rank, phase
        self.hits = 0
        self._watch: Watch | None = Watch(self._seen)
        self._watch.__enter__()

    def remove(self) -> None:
        """Stop no more."""
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None

    def __enter__(self) -> Breakpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def matches(self, found: Collective) -> bool:
        """Whether it stops here, were this its rank."""
        return fnmatchcase(found.module, self.module) and self.op in (None, found.op) and self.phase in (None, found.phase)

    def _seen(self, found: Collective, call: Call, run: Callable[[], Any]) -> Any:
        if self.matches(found) and (self.rank is None or self.rank == dist.get_rank()):
            self.hits += 1
            _stop(found)
        return run()


def break_on(module: str = "*", *, op: str | None = None, rank: int | None = 0, phase: str | None = None) -> Breakpoint:
    """Stop in the debugger at every collective of a module, in forward and backward, from here on or in a `with` block.

        shardwise.break_on("*.o_proj", op="all_reduce", rank=0)
        with shardwise.break_on("*.q_proj", phase="backward"): ...

    pdb shows the line that calls the collective, before it runs: `args` or `p x` show the tensor, `up` the layer, `c` goes on.
    A hook of your own (`sys.breakpointhook`, PYTHONBREAKPOINT) is used in its place. The other ranks wait in the collective
    meanwhile, for as long as their process group's time-out.

    Args:
        module: a pattern for the path of the module, with `*` and `?`; in backward, of the module whose forward it undoes.
        op: one collective only, such as "all_reduce".
        rank: of the default group, whose terminal it is; None for every rank.
        phase: "forward", "backward" or "recompute" only.

    Raises ShardwiseError for an `op` or `phase` that there is not.
    """
    for name, given, known in (("op", op, sorted(set(KINDS.values()))), ("phase", phase, PHASES)):
        if given is not None and given not in known:
            raise ShardwiseError(describe(f"break_on({name}={given!r}): there is none of that name.", known=", ".join(known)))
    return Breakpoint(module, op, rank, phase)


def _stop(found: Collective) -> None:
    if sys.breakpointhook is not sys.__breakpointhook__ or os.environ.get("PYTHONBREAKPOINT"):
        breakpoint()
        return
    frame, depth = inspect.currentframe(), 0
    while frame is not None and not _calls_a_collective(frame):
        frame, depth = frame.f_back, depth + 1
    debugger = _Pdb()
    debugger.message(f"rank {dist.get_rank()}: {found}")
    debugger.rcLines.append(f"up {depth}")
    debugger.set_trace(inspect.currentframe())


class _Pdb(pdb.Pdb):
    """At the terminal, also in a process that multiprocessing has started, which has no input of its own."""

    def interaction(self, *args: Any) -> None:
        before = sys.stdin
        if before is not None and getattr(before, "name", None) != os.devnull:
            super().interaction(*args)
            return
        with open("/dev/tty") as sys.stdin:
            try:
                super().interaction(*args)
            finally:
                sys.stdin = before


def _calls_a_collective(frame: FrameType) -> bool:
    """Whether it is code that wants a collective, not that which watches or carries it out."""
    name = str(frame.f_globals.get("__name__", ""))
    return not name.startswith(("shardwise.debug", "shardwise.shm", "torch.", "contextlib"))
