"""Flags between the ranks of a group: publish a step, wait for everybody's, and find out who will never come.

Each rank counts its steps. A step is: write into the own slot, then publish the number; whoever sees the number sees the data
(`segment.unsuitable`). A rank that publishes step n + 1 has read all it wants of step n, so the slots of step n may be written
again at step n + 2 without any further barrier: there are two, used in turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product

import torch
from torch import Tensor

from shardwise.errors import ShardwiseError, describe
from shardwise.shm.calls import Call
from shardwise.shm.errors import BrokenGroupError, CallMismatchError, LostRankError
from shardwise.shm.mailbox import PIECES, WORDS_EACH, Mailbox, piece_bytes
from shardwise.shm.segment import WORD, Segment, Shape

SLOT_BYTES = 1 << 22
"""Of each rank's two slots. Memory is only taken as far as it is ever written."""

_LINE = 8  # words of a cache line: flags that different ranks write lie on different ones
_STATUS = _LINE
_SAID = (2 * _LINE, 3 * _LINE)
_SPLITS = 4 * _LINE
_TEXT_WORDS = 256

_HERE, _LEFT, _LOST, _MISMATCHED, _BROKEN = range(5)
_ERRORS: dict[int, type[ShardwiseError]] = {_LOST: LostRankError, _MISMATCHED: CallMismatchError, _BROKEN: BrokenGroupError}

# Some 250 and 2 microseconds. Ranks come to a collective of a small layer that far apart, and who sleeps wakes 50 to 100 later:
# then the other one waits, and sleeps as well (decoding with 8 layers of 512: 8.3 ms a token with 50 us, 7.1 with 200).
_SPINS, _FEWEST_SPINS = 8000, 50
_YIELDS = 200
_SHORTEST, _LONGEST, _GROWTH = 2e-5, 1e-3, 1.25
_LOOK = 0.02  # seconds between looks whether the others' processes live
_MOST_VIEWS = 4096


def _mail_words(size: int) -> int:
    """Where a rank's words for mail begin: after all others, on a cache line."""
    return -(-(_SPLITS + 4 * size + _TEXT_WORDS) // _LINE) * _LINE


class Watch:
    """What a rank waits for, since when, and when it last looked whether the others live.

    Args:
        ready: whether it has come.
        waited_for: the ranks without which it will not come.
        doing: the call, for messages.
    """

    def __init__(self, ready: Callable[[], bool], waited_for: Callable[[], Iterable[int]], doing: Callable[[], str]) -> None:
        self.ready, self.waited_for, self.doing = ready, waited_for, doing
        self.start = self.looked = time.monotonic()


class Channel:
    """One rank's end.

    Args:
        ranks: the group's ranks in the default group, for messages.
        name: of the group, for messages.
        timeout: seconds that a rank waits for another.
    """

    def __init__(self, segment: Segment, ranks: Sequence[int], name: str, timeout: float) -> None:
        shape = segment.shape
        self.rank, self.size = segment.rank, shape.size
        self.timeout = timeout
        self.step = 0
        self.calls = 0
        self.call = Call("barrier")
        self.failure: ShardwiseError | None = None
        self._code, self._count = self.call.code, 0
        self._patrolled, self._patrol = 0, self._watch()
        self._segment = segment
        self._words = segment.words
        self._ranks, self._name = tuple(ranks), name
        self._own = self.rank * shape.words
        self._others = tuple(rank for rank in range(self.size) if rank != self.rank)
        self._theirs = tuple(rank * shape.words for rank in self._others)
        self._their_calls = tuple(tuple(at + said for at in self._theirs) for said in _SAID)
        self._statuses = tuple(at + _STATUS for at in self._theirs)
        crowded = self.size > len(os.sched_getaffinity(0))
        self._spins = self._most_spins = _FEWEST_SPINS if crowded else _SPINS
        self._yields = 20 if crowded else _YIELDS
        self._views: dict[tuple[torch.dtype, tuple[int, ...]], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    def begin(self, call: Call) -> None:
        """The next steps are those of `call`. Raises what another rank says that it has failed with."""
        for at in self._statuses:
            if self._words[at] >= _LOST:
                self.listen()
        self.call, self._code, self._count = call, call.code, call.elements
        self.calls += 1

    def publish(self) -> None:
        """Let the others see this rank's slot of the next step."""
        words, own = self._words, self._own
        step = self.step = self.step + 1
        said = own + _SAID[step & 1]
        words[said] = self._code
        words[said + 1] = self._count
        words[said + 2] = self.calls
        words[own] = step

    def slots(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Every rank's slot of the next step as a tensor of `shape`, by rank; of the same step once it is published."""
        views = self._views.get((dtype, shape))
        if views is None:
            views = self._make_views(dtype, shape)
        return views[self.step + 1 & 1]

    def published(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Every rank's slot of the step published last."""
        return self._views[dtype, shape][self.step & 1]

    def _make_views(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if len(self._views) >= _MOST_VIEWS:
            self._views.clear()
        with torch.inference_mode(False):  # a view that was made there could not be written elsewhere
            even, odd = (
                tuple(self._segment.tensor(self._slot(parity, rank), dtype, shape) for rank in range(self.size))
                for parity in (0, 1)
            )
        self._views[dtype, shape] = even, odd
        return even, odd

    def _slot(self, parity: int, rank: int) -> int:
        shape = self._segment.shape
        return shape.flags_bytes + (parity * self.size + rank) * shape.slot

    @property
    def slot_bytes(self) -> int:
        """What fits into one slot."""
        return self._segment.shape.slot

    def mailbox(self, sender: int, receiver: int) -> Mailbox:
        """Of this pair of ranks."""
        return Mailbox(self._segment, _mail_words(self.size), sender, receiver)

    def say_splits(self, sends: Sequence[int], expects: Sequence[int]) -> None:
        """With the next step: how many elements this rank sends to each, and expects of each."""
        start = self._own + _SPLITS + (self.step + 1 & 1) * 2 * self.size
        for index, count in enumerate((*sends, *expects)):
            self._words[start + index] = count

    def agree_on_splits(self) -> int:
        """The most elements that go from one rank to another. Raises `CallMismatchError` where sent and expected differ."""
        start, size = _SPLITS + (self.step & 1) * 2 * self.size, self.size
        bases = [rank * self._segment.shape.words + start for rank in range(size)]
        sends = [self._words[base : base + size].tolist() for base in bases]
        expects = [self._words[base + size : base + 2 * size].tolist() for base in bases]
        for sender, receiver in product(range(size), range(size)):
            sent, expected = sends[sender][receiver], expects[receiver][sender]
            if sent != expected:
                names = self._ranks[sender], self._ranks[receiver]
                ours = f"{self._own_call()}: sends {sent} elements to rank {names[1]}"
                theirs = f"{self._own_call()}: expects {expected} elements of rank {names[0]}"
                self.fail(self._different((names[0], ours), (names[1], theirs)))
        return max(max(row) for row in sends)

    def is_ready(self) -> bool:
        """Whether everybody has published this rank's step."""
        step, words = self.step, self._words
        return all(words[at] >= step for at in self._theirs)

    def wait(self) -> None:
        """Until everybody has published this step, and said the same call with it.

        Raises `LostRankError` for a rank that never will, and `CallMismatchError` where the calls differ; in both cases the
        group is broken for all of its ranks.
        """
        step, words = self.step, self._words
        for at in self._theirs:
            if words[at] < step:
                spins = self._spins
                for _ in range(spins):
                    if words[at] >= step:
                        self._spins = min(2 * spins, self._most_spins)
                        break
                else:
                    # In vain, as when both ranks have only one core between them: sooner the next time.
                    self._spins = max(spins // 2, _FEWEST_SPINS)
                    self.wait_slowly(self._watch())
        self.compare()

    def compare(self) -> None:
        """That the others, all at this step, are in the same call. Raises `CallMismatchError`."""
        words = self._words
        for said in self._their_calls[self.step & 1]:
            if words[said] != self._code or words[said + 1] != self._count:
                self._mismatch()

    def wait_slowly(self, watch: Watch) -> None:
        """Until it has come, without burning the processor: give way first, then sleep for longer and longer.

        Raises `LostRankError` when a rank is gone that it needs, and whatever another rank says that it has failed with.
        """
        pause, yields = _SHORTEST, self._yields
        while not watch.ready():
            if yields:
                yields -= 1
                time.sleep(0)  # other threads of this process
                os.sched_yield()
            else:
                time.sleep(pause)
                pause = min(pause * _GROWTH, _LONGEST)
            self.look(watch)

    def patrol(self) -> None:
        """As `wait_slowly` for the step, one look, for a caller that comes back."""
        if self._patrolled != self.step:
            self._patrolled, self._patrol = self.step, self._watch()
        self.look(self._patrol)

    def _watch(self) -> Watch:
        return Watch(self.is_ready, self._behind, self._own_call)

    def look(self, watch: Watch) -> None:
        """Raise where it is clear that it will not come, or has not come in time."""
        self.listen()
        now = time.monotonic()
        if now - watch.looked > _LOOK:
            watch.looked = now
            self._look_for_lost(watch)
        if now - watch.start > self.timeout and not watch.ready():
            self._too_late(now - watch.start, watch)

    def listen(self) -> None:
        """Raise what another rank says that it failed with."""
        for rank, at in zip(self._others, self._theirs, strict=True):
            status = self._words[at + _STATUS]
            if status >= _LOST:
                self.fail(_ERRORS[status](self._read_text(rank)))

    def _look_for_lost(self, watch: Watch) -> None:
        for rank in watch.waited_for():
            left = self._words[rank * self._segment.shape.words + _STATUS] == _LEFT
            if (left or not self._segment.is_alive(rank)) and not watch.ready():
                self.listen()
                how = "has left the group" if left else "is gone: its process has ended"
                self.fail(
                    LostRankError(
                        self._lost(
                            rank,
                            how,
                            watch,
                            f"see what rank {self._ranks[rank]} said before it ended, or",
                            "whether it was killed",
                        )
                    )
                )

    def _too_late(self, seconds: float, watch: Watch) -> None:
        missing = list(watch.waited_for())
        names = ", ".join(str(self._ranks[rank]) for rank in missing)
        fixes = "find out where it is, or", "give the group more time: init_process_group(..., timeout=...)"
        how = f"did not come within {seconds:.3g} s (missing: {names})"
        self.fail(LostRankError(self._lost(missing[0], how, watch, *fixes)))

    def _lost(self, rank: int, how: str, watch: Watch, *fixes: str) -> str:
        return describe(
            f"rank {self._ranks[rank]} {how}, and rank {self._ranks[self.rank]} waits for it in {watch.doing()}.",
            there=f"its last call was {self._last_call(rank)}",
            group=self._name,
            either=fixes,
        )

    def _mismatch(self) -> None:
        words, width = self._words, self._segment.shape.words
        for rank in self._others:
            said = rank * width + _SAID[self.step & 1]
            code, count, number = words[said : said + 3].tolist()
            if (code, count) != (self._code, self._count):
                theirs = f"{Call.decode(code, count)} (call {number})"
                self.fail(self._different((self._ranks[rank], theirs), (self._ranks[self.rank], self._own_call())))

    def _different(self, first: tuple[int, str], second: tuple[int, str]) -> CallMismatchError:
        (one, ours), (other, theirs) = sorted([first, second])
        return CallMismatchError(
            describe(
                f"rank {one} and rank {other} made different calls.",
                **{f"rank {one}": ours, f"rank {other}": theirs},
                group=self._name,
                fix="every rank must make the same calls in the same order, on batches of the same size",
            )
        )

    def interrupted(self, error: BaseException) -> str:
        """What the others are told where this rank leaves a call in its middle."""
        return describe(
            f"rank {self._ranks[self.rank]} was interrupted in {self._own_call()}.", by=repr(error), group=self._name
        )

    def _own_call(self) -> str:
        return f"{self.call} (call {self.calls})"

    def _last_call(self, rank: int) -> str:
        base = rank * self._segment.shape.words
        step = self._words[base]
        if step == 0:
            return "none: it has made no call in this group yet"
        said = base + _SAID[step & 1]
        code, count, number = self._words[said : said + 3].tolist()
        return f"{Call.decode(code, count)} (call {number})"

    def fail(self, error: ShardwiseError) -> None:
        """Break the group for all with `error`, unless it is broken already, and raise what it is broken with."""
        if self.failure is None:
            self.failure = error
            status = next((status for status, kind in _ERRORS.items() if isinstance(error, kind)), _BROKEN)
            text = str(error).encode()[: (_TEXT_WORDS - 1) * WORD]
            start = (self._own + self._text_at) * WORD
            self._segment.text(start + WORD, len(text))[:] = text
            self._words[self._own + self._text_at] = len(text)
            self._words[self._own + _STATUS] = status
        self.check()

    def check(self) -> None:
        """Raise what the group is broken with, if it is."""
        if self.failure is not None:
            raise type(self.failure)(*self.failure.args)

    @property
    def _text_at(self) -> int:
        return _SPLITS + 4 * self.size

    def _read_text(self, rank: int) -> str:
        start = rank * self._segment.shape.words + self._text_at
        length = self._words[start]
        return bytes(self._segment.text((start + 1) * WORD, length)).decode(errors="replace")

    def _behind(self) -> list[int]:
        return [rank for rank, at in zip(self._others, self._theirs, strict=True) if self._words[at] < self.step]

    def leave(self) -> None:
        """Tell the others that this rank makes no more calls, and let go of the memory."""
        if self.failure is None:
            self._words[self._own + _STATUS] = _LEFT
            self.failure = BrokenGroupError(f"the process group {self._name!r} has been destroyed.")
        self._views.clear()
        self._segment.close()


def make_shape(size: int) -> Shape:
    """The segment of `size` ranks."""
    return Shape(size, _mail_words(size) + size * WORDS_EACH, SLOT_BYTES, PIECES * piece_bytes(size))
