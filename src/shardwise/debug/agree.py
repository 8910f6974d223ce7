"""Whether all ranks are about to make the same collective: compared before each one, so that none of them hangs."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, but missing in __all__

from shardwise.debug.operators import Call
from shardwise.debug.record import Collective
from shardwise.debug.standing import Standing, stack_lines
from shardwise.errors import MeshError, MismatchError, MissingRankError, describe, ranks_in_words
from shardwise.rendezvous import meet_ranks

_ANSWER_SECONDS = 5.0
_LOOK_SECONDS = 0.25
_SHORTEST, _LONGEST = 20e-6, 5e-3
_POINT_TO_POINT = ("send", "recv")


@dataclass(frozen=True, slots=True)
class _Turn:
    """The `number`th collective of the group of `ranks`, as this rank is about to make it."""

    ranks: tuple[int, ...]
    number: int
    found: Collective
    agreed: tuple[tuple[int, ...], ...]

    @property
    def group(self) -> str:
        return _name(self.ranks)

    def __str__(self) -> str:
        return f"collective {self.number} of {ranks_in_words(self.ranks)}"

    @property
    def digest(self) -> str:
        one = self.found
        same = (one.op, one.phase, one.module, one.parameter, self.agreed, one.dtype)
        return hashlib.blake2b(repr(same).encode(), digest_size=8).hexdigest()


class Agreement:
    """Compares each collective with the other ranks' through the process group's store, before it is begun.

    Each rank says which turn of a group it has come to, with a hash of what it is about to do there, and goes on when all have
    said the same. So a difference is found at the first collective that differs, while every rank still stands before it.

    Args:
        timeout: seconds to wait for the others.

    Collective. Raises `MissingRankError` where a rank does not come, `MeshError` without a process group.
    """

    def __init__(self, timeout: float) -> None:
        if not dist.is_initialized():
            raise MeshError("trace_collectives(check=True) compares ranks: there is no process group yet.")
        self._timeout, self._rank = timeout, dist.get_rank()
        store = dist.distributed_c10d._get_default_store()
        block = meet_ranks(range(dist.get_world_size()), "trace_collectives(check=True)", timeout)
        prefix = f"shardwise/check/{block}"
        self._store = PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]  # missing in torch's stub
        self._standing = Standing(PrefixStore(prefix, store.clone()), self._rank)  # type: ignore[attr-defined]
        self._numbers: dict[str, int] = {}
        self._said: dict[str, str] = {}
        self._last: dict[str, Collective] = {}
        self._begun: set[str] = set()

    def leave(self, error: BaseException | None) -> None:
        """Say that this rank makes no more collectives here, and why."""
        self._standing.stop()
        words = str(error).partition("\n")[0]
        why = f" by {type(error).__name__}{': ' if words else ''}{words}" if error is not None else ""
        try:
            self._store.set(f"left/{self._rank}", f"left the block{why}")
        except RuntimeError:
            if error is None:
                raise

    def before(self, found: Collective, call: Call) -> None:
        """Return when every rank of the group is about to make this collective.

        Raises:
            MismatchError: a rank is about to make another one.
            MissingRankError: a rank has left, is in another group's collective that waits for this one, or does not come.
        """
        if found.op in _POINT_TO_POINT or len(found.ranks) < 2:
            return
        group = _name(found.ranks)
        turn = _Turn(found.ranks, self._numbers.get(group, 0) + 1, found, call.agreed)
        try:
            self._say(turn)
            digests = self._hear(turn)
            if any(digest != turn.digest for digest in digests.values()):
                raise self._mismatch(turn)
        except MissingRankError:
            self._store.set(f"turns/{group}/{self._rank}", "")  # taken back: whoever comes later must not begin alone
            raise
        except dist.DistError as error:
            raise MissingRankError(f"The ranks' store is gone, and with it the rank or agent that kept it: {error}") from error
        self._numbers[group], self._last[group] = turn.number, found

    def _say(self, turn: _Turn) -> None:
        """This turn, and the one before, which a slower rank may not have read yet. None can be two behind."""
        said = f"{turn.number} {turn.digest}"
        self._store.set(f"turns/{turn.group}/{self._rank}", f"{said} {self._said.get(turn.group, '')}")
        self._said[turn.group] = said

    def _hear(self, turn: _Turn) -> dict[int, str]:
        """The digests of all ranks at this turn."""
        digests, began, pause, looked = {self._rank: turn.digest}, time.monotonic(), _SHORTEST, 0.0
        while True:
            for rank in turn.ranks:
                if rank not in digests and (digest := self._read(turn, rank)) is not None:
                    digests[rank] = digest
            late, waited = [rank for rank in turn.ranks if rank not in digests], time.monotonic() - began
            if not late:
                return digests
            if waited - looked > _LOOK_SECONDS:
                looked = waited
                self._look(turn, late)
            if waited > self._timeout:
                raise self._missing(turn, late)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    def _read(self, turn: _Turn, rank: int) -> str | None:
        key = f"turns/{turn.group}/{rank}"
        if key not in self._begun:
            if not self._store.check([key]):
                return None
            self._begun.add(key)
        words = self._store.get(key).decode().split()
        return dict(zip(words[::2], words[1::2], strict=True)).get(str(turn.number))

    def _look(self, turn: _Turn, late: Sequence[int]) -> None:
        """Whether any of the late ranks can still come."""
        waiting = {"ranks": turn.ranks, "number": turn.number, "what": str(turn.found)}
        self._store.set(f"waits/{self._rank}", json.dumps(waiting))
        for rank in late:
            if self._store.check([f"left/{rank}"]):
                if self._read(turn, rank) is not None:
                    continue
                raise self._gone(turn, rank)
            if self._store.check([f"waits/{rank}"]) and self._crossed(
                turn, other := json.loads(self._store.get(f"waits/{rank}"))
            ):
                raise self._deadlock(turn, rank, other)

    def _crossed(self, turn: _Turn, other: dict[str, Any]) -> bool:
        """Whether a rank waits for this one in a collective of another group that this one has not come to."""
        ranks = tuple(other["ranks"])
        return ranks != turn.ranks and self._rank in ranks and self._numbers.get(_name(ranks), 0) < other["number"]

    def _mismatch(self, turn: _Turn) -> MismatchError:
        mine = [str(turn.found), *stack_lines(inspect.currentframe())]
        self._store.set(f"details/{turn.group}/{self._rank}", "\n".join(mine))
        said: dict[str, list[int]] = {}
        for rank in turn.ranks:
            said.setdefault(self._answer(f"details/{turn.group}/{rank}") or "(it did not say)", []).append(rank)
        facts = {ranks_in_words(ranks): text.splitlines() for text, ranks in said.items()}
        return MismatchError(
            describe(
                f"The ranks part at {turn}: they are about to make different ones.",
                **facts,
                before=self._before(turn),
                why="the n-th collective of a group has to be the same on all of its ranks; none of them has begun it",
            )
        )

    def _missing(self, turn: _Turn, late: Sequence[int]) -> MissingRankError:
        for rank in late:
            self._store.set(f"ask/{rank}", "")
        stands = {f"rank {rank}": (self._answer(f"stands/{rank}") or _SILENT).splitlines() for rank in late}
        return MissingRankError(
            describe(
                f"{ranks_in_words(late)} did not come to {turn} within {self._timeout:g} s.",
                waiting=f"{ranks_in_words([r for r in turn.ranks if r not in late])}: {turn.found}",
                **stands,
                before=self._before(turn),
                either=["see why it is there, or does not answer, or", "if it is only late, give it more time: timeout=..."],
            )
        )

    def _gone(self, turn: _Turn, rank: int) -> MissingRankError:
        left = self._store.get(f"left/{rank}").decode()
        return MissingRankError(
            describe(
                f"rank {rank} will not come to {turn}: it {left}.",
                waiting=f"rank {self._rank}: {turn.found}",
                before=self._before(turn),
            )
        )

    def _deadlock(self, turn: _Turn, rank: int, other: dict[str, Any]) -> MissingRankError:
        return MissingRankError(
            describe(
                f"rank {self._rank} and rank {rank} wait for each other, in collectives of different groups.",
                **{
                    f"rank {self._rank}": f"{turn}: {turn.found}",
                    f"rank {rank}": f"collective {other['number']} of {ranks_in_words(other['ranks'])}: {other['what']}",
                },
                why="ranks that share several groups have to go through their collectives in the same order",
            )
        )

    def _before(self, turn: _Turn) -> str:
        return str(self._last.get(turn.group, "nothing: it is the first of the block"))

    def _answer(self, key: str) -> str | None:
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                return None
            time.sleep(_LONGEST)
        return self._store.get(key).decode()


_SILENT = "does not answer: its process has ended or is stopped"


def _name(ranks: Sequence[int]) -> str:
    """Of a group by its ranks: what c10d calls it may differ between them."""
    return "-".join(map(str, ranks))
