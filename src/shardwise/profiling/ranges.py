"""Ranges in the profiler's trace for the modules that run."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch.profiler import record_function

from shardwise.debug.place import Places

MODULE = "module "
"""What the names of the ranges begin with: "module model.layers.0.mlp"."""


class Ranges(Places):
    """`Places` that opens a range in the profiler for each module, on the thread that has made it."""

    def __init__(self) -> None:
        super().__init__(_only_here())
        self._open: list[record_function] = []

    def entered(self, path: str) -> None:
        """Open one."""
        opened = record_function(MODULE + path)
        opened.__enter__()
        self._open.append(opened)

    def left(self) -> None:
        """Close it."""
        self._open.pop().__exit__(None, None, None)


def _only_here() -> Callable[[], bool]:
    own = threading.get_ident()
    return lambda: threading.get_ident() == own
