"""Where a rank stands: the lines of the program that it is in, and an answer to others that ask for them."""

from __future__ import annotations

import linecache
import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed import Store  # type: ignore[attr-defined]  # public, but missing in __all__

_FIRST, _LAST = 3, 4
_POLL_SECONDS = 0.1
# What carries out the calls that people write: torch, how we reach it, and what starts a program or a thread.
_MACHINERY = (
    "torch.",
    "shardwise.debug.",
    "shardwise.shm.",
    "shardwise.collectives",
    "shardwise.model",
    "shardwise.testing.",
    "transformers.utils",
    "multiprocessing.",
    "threading",
    "runpy",
    "contextlib",
)
_INSTALLED = ("site-packages" + os.sep, "dist-packages" + os.sep)


def stack_lines(frame: FrameType | None) -> list[str]:
    """The calls that led to `frame`, the last one last: "train.py:12 in step: loss.backward()". Without torch's own."""
    calls = [(one, line) for one, line in traceback.walk_stack(frame) if not _is_machinery(one)]
    lines = [_describe(one, line) for one, line in reversed(calls)]
    return lines if len(lines) <= _FIRST + _LAST else [*lines[:_FIRST], "...", *lines[-_LAST:]]


def _is_machinery(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(_MACHINERY) or frame.f_code.co_filename.startswith("<")


def _describe(frame: FrameType, line: int) -> str:
    file = frame.f_code.co_filename
    return f"{_short(file)}:{line} in {frame.f_code.co_name}: {linecache.getline(file, line).strip()}"


def _short(file: str) -> str:
    for part in _INSTALLED:
        if part in file:
            return file.rpartition(part)[2]
    for folder in (Path.cwd(), Path(__file__).parents[2]):
        with suppress(ValueError):
            return str(Path(file).relative_to(folder))
    return file


class Standing:
    """Answers, from a thread of its own, where the thread that made it stands; until `stop`.

    Args:
        store: its own connection to the store, used by no other thread.
        rank: this rank.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._asked, self._answer = store, f"ask/{rank}", f"stands/{rank}"
        self._watched, self._over = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="shardwise-standing", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._over.set()
        self._thread.join()

    def _listen(self) -> None:
        with suppress(RuntimeError):  # the store is gone: nobody can ask any more
            while not self._over.wait(_POLL_SECONDS):
                if self._store.check([self._asked]):
                    self._store.delete_key(self._asked)
                    self._store.set(self._answer, "\n".join(stack_lines(sys._current_frames().get(self._watched))))
