"""What went wrong on which rank, and what the caller is told about it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from shardwise.errors import ShardwiseError, ranks_in_words

# What the remaining ranks are told when another one is gone: a consequence, never the cause. (gloo, shm, nccl, threads)
_ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "is gone: its process has ended",
    "has left the group",
    "NCCL communicator was aborted",
    "Test termination event occurs",
)

_HERE = str(Path(__file__).parent)


class RankError(ShardwiseError, RuntimeError):
    """A rank that raised or died. `rank` says which; `__cause__` is its exception, where that could be sent."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class RankTimeoutError(RankError, TimeoutError):
    """Ranks that did not answer in time; `ranks` says which. The message shows where each of them stood."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message, ranks[0])
        self.ranks = tuple(ranks)


@dataclass(frozen=True, slots=True)
class Failure:
    """How one rank failed.

    Args:
        when: by `time.monotonic`, which all processes of a machine share.
        headline: one line.
        text: its traceback, or whatever else is known.
        error: the exception itself; None where there is none or it could not be sent.
    """

    when: float
    headline: str
    text: str = ""
    error: BaseException | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """The failure that an exception, just caught, stands for; its text begins where the caller's code does."""
        text = "".join(traceback.format_exception(type(error), error, _callers_part(error.__traceback__))).rstrip()
        headline = "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[0]
        return cls(time.monotonic(), f"raised {headline}", text, error)

    @property
    def is_echo(self) -> bool:
        """Whether this is only what another rank's failure looks like from here."""
        return any(echo in self.text for echo in _ECHOES)


def rank_error(failures: Mapping[int, Failure], size: int, silent: Sequence[int] = ()) -> RankError:
    """The error to raise for `failures` (by rank, at least one): the first that is not an echo of another rank's.

    `silent`: ranks that had not answered when waiting for them ended.
    """
    rank = min(failures, key=lambda rank: (failures[rank].is_echo, failures[rank].when))
    first = failures[rank]
    lines = [f"rank {rank} of {size} {first.headline}"]
    others = sorted(failures.keys() - {rank})
    if others:
        lines.append(f"  {ranks_in_words(others)} failed too, later or because of it")
    if silent:
        lines.append(f"  {ranks_in_words(silent)} did not finish")
    if first.text:
        lines += [f"--- rank {rank} ---", first.text]
    error = RankError("\n".join(lines), rank)
    error.__cause__ = first.error
    return error


def timeout_error(stacks: Mapping[int, str], size: int, timeout: float) -> RankTimeoutError:
    """The error to raise for ranks that hang; `stacks` says by rank where each of them stands."""
    ranks = sorted(stacks)
    lines = [f"{ranks_in_words(ranks)} of {size} did not answer within {timeout:g} s"]
    for rank in ranks:
        lines += [f"--- rank {rank} ---", callers_stack(stacks[rank]).rstrip()]
    return RankTimeoutError("\n".join(lines), ranks)


def callers_stack(text: str) -> str:
    """The part of a stack dump (by `faulthandler` or by `traceback`) that shows the caller's code, not this package's."""
    threads = [thread for thread in text.split("\n\n") if "_follow_parent" not in thread]
    return "\n\n".join(_without_own_lines(thread.splitlines()) for thread in threads) if threads else text


def _without_own_lines(lines: list[str]) -> str:
    own = [index for index, line in enumerate(lines) if _HERE in line]
    if not own:
        return "\n".join(lines)
    if "most recent call first" in lines[0]:
        return "\n".join(lines[: own[0]])
    return "\n".join(lines[own[-1] + 2 :])  # a frame of ours is two lines: where, and the code


def _callers_part(frames: TracebackType | None) -> TracebackType | None:
    rest = frames
    while rest is not None and rest.tb_frame.f_code.co_filename.startswith(_HERE):
        rest = rest.tb_next
    return rest or frames
