"""Messages from one rank to another: each pair has a mailbox of a few pieces in each direction.

Small messages are in the mailbox when `send` returns; of a longer one the sender waits until the receiver has made room. A
message belongs to the first receiver that was posted for its tag; one that nobody has asked for yet waits in memory of its own
when a later one is asked for. Pieces of the messages between two ranks stay in order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor
from torch._C._distributed_c10d import Work

from shardwise.shm.channel import Channel, Watch
from shardwise.shm.errors import CallMismatchError
from shardwise.shm.mailbox import Mailbox

_ANY = -1
_QUICK = 50  # looks before a waiting rank gives way
_TAGS = (1 << 64) - 1


class Message(Work):
    """The handle of one message, sent or received. `data`: its bytes. `peer`: the other rank, -1 for whichever."""

    def __init__(self, mail: Mail, tensor: Tensor, data: Tensor, peer: int, tag: int, sends: bool) -> None:
        super().__init__()
        self.tensor, self.data, self.peer, self.tag, self.sends = tensor, data, peer, tag & _TAGS, sends
        self.moved = 0
        self.claimed = False
        self.done = False
        self.error: Exception | None = None
        self._mail = mail

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Until it has left this rank's tensor, or lies in it. Raises what went wrong; always True otherwise."""
        if not self.done:
            self._mail.finish(self)
        if self.error is not None:
            raise self.error
        return True

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return self.done

    def is_success(self) -> bool:
        """Whether it is done, and nothing went wrong."""
        return self.done and self.error is None

    def _source_rank(self) -> int:
        return self.peer

    source_rank = _source_rank

    def result(self) -> list[Tensor]:
        """The tensor."""
        return [self.tensor]

    def __str__(self) -> str:
        whom = "anybody" if self.peer == _ANY else f"rank {self.peer} of the group"
        return f"{'send to' if self.sends else 'recv from'} {whom} ({self.data.numel()} bytes, tag {self.tag})"


class _Letter:
    """A message of which this rank has begun to take the pieces; `message` is who asked for it, if anybody has."""

    def __init__(self, tag: int, data: Tensor, message: Message | None) -> None:
        self.tag, self.data, self.message = tag, data, message
        self.moved = 0


class Mail:
    """One rank's messages."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        everybody = range(channel.size)
        self._outgoing = [channel.mailbox(channel.rank, rank) for rank in everybody]
        self._incoming = [channel.mailbox(rank, channel.rank) for rank in everybody]
        self._lock = threading.Lock()
        self._out: list[deque[Message]] = [deque() for _ in range(channel.size)]
        self._asked: list[Message] = []
        self._opened: list[_Letter | None] = [None] * channel.size
        self._kept: list[list[_Letter]] = [[] for _ in range(channel.size)]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do until the next call."""
        return not self._asked and not any(self._out) and not any(self._opened)

    def send(self, tensor: Tensor, data: Tensor, peer: int, tag: int) -> Message:
        """Begin to send `data`, the bytes of `tensor`."""
        message = Message(self, tensor, data, peer, tag, True)
        with self._lock:
            self._out[peer].append(message)
            self._move_out(peer)
        return message

    def receive(self, tensor: Tensor, data: Tensor, peer: int, tag: int) -> Message:
        """Ask for a message of `peer`, or of anybody with -1, into `data`: the bytes of `tensor`, or of a copy of it."""
        message = Message(self, tensor, data, peer, tag, False)
        with self._lock:
            if not self._claim_kept(message):
                self._asked.append(message)
                self._move()
        return message

    def finish(self, message: Message) -> None:
        """Until `message` is done. Raises `LostRankError` where that will not be."""
        channel = self._channel
        for _ in range(_QUICK):
            if self._moved(message):
                return
        others = [rank for rank in range(channel.size) if rank != channel.rank]
        channel.wait_slowly(
            Watch(
                lambda: self._moved(message), lambda: others if message.peer == _ANY else [message.peer], lambda: str(message)
            )
        )

    def look(self) -> None:
        """Move what can be moved; where the group is broken, give up."""
        if self._lock.acquire(blocking=False):
            try:
                if self._channel.failure is None:
                    self._move()
                else:
                    self._failed()
            finally:
                self._lock.release()

    def _moved(self, message: Message) -> bool:
        with self._lock:
            if not message.done:
                self._channel.check()
                self._move()
        return message.done

    def _move(self) -> None:
        for rank in range(self._channel.size):
            if self._out[rank]:
                self._move_out(rank)
            if self._asked or self._opened[rank] is not None:
                self._move_in(rank)

    def _move_out(self, peer: int) -> None:
        box, queue = self._outgoing[peer], self._out[peer]
        while queue and box.has_room:
            message = queue[0]
            piece = message.data[message.moved : message.moved + box.piece_bytes]
            box.put(piece, message.tag, message.data.numel())
            message.moved += piece.numel()
            if message.moved == message.data.numel():
                queue.popleft()
                message.done = True

    def _move_in(self, peer: int) -> None:
        box = self._incoming[peer]
        while box.taken < box.sent:
            letter = self._opened[peer]
            if letter is None:
                if not self._asked:
                    return  # it keeps in the box
                letter = self._opened[peer] = self._open(peer, *box.label)
            letter.moved += self._take(box, letter)
            if letter.moved == letter.data.numel():
                self._opened[peer] = None
                self._deliver(peer, letter)

    @staticmethod
    @torch.inference_mode()  # what is written to may be of either mode, and only there both may be written to
    def _take(box: Mailbox, letter: _Letter) -> int:
        piece = letter.data[letter.moved : letter.moved + box.piece_bytes]
        box.take(piece)
        return piece.numel()

    def _open(self, peer: int, tag: int, count: int) -> _Letter:
        for message in self._asked:
            if message.tag == tag and message.peer in (peer, _ANY):
                self._asked.remove(message)
                message.peer = peer
                if message.data.numel() == count:
                    return _Letter(tag, message.data, message)
                message.error = CallMismatchError(f"{message}: rank {peer} has sent {count} bytes.")
                return _Letter(tag, torch.empty(count, dtype=torch.uint8), message)
        return _Letter(tag, torch.empty(count, dtype=torch.uint8), None)

    def _deliver(self, peer: int, letter: _Letter) -> None:
        message = letter.message
        if message is None:
            self._kept[peer].append(letter)
        else:
            self._hand_over(letter, message)

    def _failed(self) -> None:
        """The others wait for what will not come, and so do those of this rank that wait for them."""
        opened = [letter.message for letter in self._opened if letter is not None and letter.message is not None]
        for message in [*self._asked, *opened, *(message for queue in self._out for message in queue)]:
            message.error = self._channel.failure
            message.done = True
        self._asked.clear()
        self._opened = [None] * self._channel.size
        for queue in self._out:
            queue.clear()

    @staticmethod
    @torch.inference_mode()
    def _hand_over(letter: _Letter, message: Message) -> None:
        if message.error is None:
            if message.data is not letter.data:
                message.data.copy_(letter.data)
            if message.tensor.data_ptr() != message.data.data_ptr():
                copy = message.data.view(message.tensor.dtype).view(message.tensor.shape)
                message.tensor.data.copy_(copy)
        message.done = True

    def _claim_kept(self, message: Message) -> bool:
        for peer, kept in enumerate(self._kept):
            if message.peer not in (peer, _ANY):
                continue
            for letter in self._on_the_way(peer, kept):
                if letter.tag == message.tag and letter.message is None:
                    message.peer = peer
                    letter.message = message
                    if letter.data.numel() != message.data.numel():
                        message.error = CallMismatchError(f"{message}: rank {peer} has sent {letter.data.numel()} bytes.")
                    if letter in kept:
                        kept.remove(letter)
                        self._hand_over(letter, message)
                    return True
        return False

    def _on_the_way(self, peer: int, kept: list[_Letter]) -> Iterator[_Letter]:
        yield from list(kept)
        opened = self._opened[peer]
        if opened is not None:
            yield opened
