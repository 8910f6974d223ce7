"""The mailbox of an ordered pair of ranks: a ring of pieces, a counter of the sender, and one of the receiver."""

from __future__ import annotations

import torch
from torch import Tensor

from shardwise.shm.segment import PAGE, Segment

PIECES = 4
_PIECE_BYTES = 1 << 18
_ALL_BYTES = 1 << 25
_LINE = 8
WORDS_EACH = 3 * _LINE
"""Words that each rank needs for every other: what it has sent, the labels of those pieces, and what it has taken."""


def piece_bytes(size: int) -> int:
    """The longest piece between `size` ranks, of whom every two have two mailboxes: all of them take 32 MiB at most."""
    return min(_PIECE_BYTES, _ALL_BYTES // (PIECES * size * size) // PAGE * PAGE) or PAGE


class Mailbox:
    """From `sender` to `receiver`; `start` is where the words for mail begin in a rank's block."""

    def __init__(self, segment: Segment, start: int, sender: int, receiver: int) -> None:
        shape = segment.shape
        self._words = segment.words
        self._sent = sender * shape.words + start + receiver * WORDS_EACH
        self._labels = self._sent + _LINE
        self._taken = receiver * shape.words + start + sender * WORDS_EACH + 2 * _LINE
        first = shape.mailboxes + (sender * shape.size + receiver) * shape.mailbox
        self.piece_bytes = length = shape.mailbox // PIECES
        with torch.inference_mode(False):
            self._pieces = [segment.tensor(first + index * length, torch.uint8, (length,)) for index in range(PIECES)]

    @property
    def sent(self) -> int:
        """Pieces that the sender has put into it, ever."""
        return self._words[self._sent]

    @property
    def taken(self) -> int:
        """Pieces that the receiver has taken out of it, ever."""
        return self._words[self._taken]

    def put(self, data: Tensor, tag: int, whole: int) -> None:
        """The sender's: the next piece, of a message of `whole` bytes. There must be room."""
        number = self._words[self._sent]
        self._pieces[number % PIECES][: data.numel()].copy_(data)
        label = self._labels + 2 * (number % PIECES)
        self._words[label] = tag
        self._words[label + 1] = whole
        self._words[self._sent] = number + 1

    @property
    def has_room(self) -> bool:
        """Whether a piece can be put."""
        return self._words[self._sent] - self._words[self._taken] < PIECES

    @property
    def label(self) -> tuple[int, int]:
        """The tag of the first piece that is there, and the bytes of its whole message."""
        label = self._labels + 2 * (self._words[self._taken] % PIECES)
        return self._words[label], self._words[label + 1]

    def take(self, out: Tensor) -> None:
        """The receiver's: the first piece that is there into `out`, of its size."""
        number = self._words[self._taken]
        out.copy_(self._pieces[number % PIECES][: out.numel()])
        self._words[self._taken] = number + 1
