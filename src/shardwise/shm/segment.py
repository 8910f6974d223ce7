"""The memory that the ranks of one group share, and how they find out that they share it.

    | rank 0's words | rank 1's words | ... | slots of parity 0, by rank | slots of parity 1, by rank | mailboxes |

Rank 0 makes it with `memfd_create`, the others open it through /proc: it is private to the user, in no file system, without a
name that could collide, and gone when the last process is. Where /proc does not show the process (another pid namespace) it is
a file in /dev/shm with mode 0600 and a random name, unlinked as soon as all have mapped it.

That the ranks are on one host is not concluded from names, but shown: rank 0 writes a random token into the segment, and each
rank proves through the store that it has read it there. Each rank holds a record lock on a byte of its own; the kernel takes it
away when the process ends, however that happens, which is how the others see it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import platform
import secrets
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

WORD = 8
"""Bytes of a word: what one aligned load or store moves."""

PAGE = 4096

_FILES = "/dev/shm"
_TOKEN = 32
_LOCKS = 1 << 40  # beyond every byte that is ever written
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid


@dataclass(frozen=True, slots=True)
class Shape:
    """How a segment is laid out: `size` ranks, `words` flags of each, slots and mailboxes of so many bytes each."""

    size: int
    words: int
    slot: int
    mailbox: int = 0

    @property
    def flags_bytes(self) -> int:
        """The part in front, in whole pages; its last bytes are the token."""
        return -(-(self.size * self.words * WORD + _TOKEN) // PAGE) * PAGE

    @property
    def mailboxes(self) -> int:
        """Where the mailboxes begin, in bytes."""
        return self.flags_bytes + 2 * self.size * self.slot

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.mailboxes + self.size * self.size * self.mailbox


class Segment:
    """One mapping of the shared memory, this rank's.

    Args:
        file: an open descriptor, which the segment then owns.
    """

    def __init__(self, file: int, shape: Shape, rank: int) -> None:
        self.shape = shape
        self.rank = rank
        self._file = file
        self._pid = os.getpid()
        self._map = mmap.mmap(file, shape.bytes)
        self._view = memoryview(self._map)
        self.words = self._view[: shape.flags_bytes].cast("Q")
        # What the process holds of this file is released when it closes any descriptor of it: so none is until the end.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCKS + rank)
        with torch.inference_mode(False):
            self._data = torch.frombuffer(self._map, dtype=torch.uint8)

    def tensor(self, start: int, dtype: torch.dtype, shape: Iterable[int]) -> Tensor:
        """The bytes from `start` on as a tensor; `start` is a multiple of the dtype's size."""
        sizes = tuple(shape)
        count = torch.Size(sizes).numel()
        return self._data[start : start + count * dtype.itemsize].view(dtype).view(sizes)

    def text(self, start: int, length: int) -> memoryview:
        """`length` bytes from `start` on, as they are."""
        return self._view[start : start + length]

    def is_alive(self, rank: int) -> bool:
        """Whether the process of this (other) rank has not ended. A system call."""
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _LOCKS + rank, 1, 0)
        answer: int = struct.unpack(_FLOCK, fcntl.fcntl(self._file, fcntl.F_GETLK, asked))[0]
        return answer != fcntl.F_UNLCK

    def sign(self) -> None:
        """Write the token, which only those can know who see this memory."""
        self._token()[:] = secrets.token_bytes(_TOKEN)

    def prove(self, rank: int) -> str:
        """What only a process can say that sees this memory."""
        return hashlib.sha256(bytes(self._token()) + str(rank).encode()).hexdigest()

    def close(self) -> None:
        """Unmap it, as far as nobody holds tensors of it; without effect in a process that was forked."""
        if self._pid != os.getpid() or self._file < 0:
            return
        os.close(self._file)
        self._file = -1
        self.words.release()
        self._view.release()
        del self._data
        with contextlib.suppress(BufferError):  # tensors that somebody still holds: it goes with them
            self._map.close()

    def _token(self) -> memoryview:
        return self._view[self.shape.flags_bytes - _TOKEN : self.shape.flags_bytes]


def unsuitable() -> str | None:
    """Why this machine cannot exchange through shared memory, or None where it can.

    A rank writes its data, then its flag, and who sees the flag must see the data. x86-64 promises that (total store order:
    stores become visible in the order in which they were made); other machines do not without barriers that Python cannot ask
    for.
    """
    if platform.system() != "Linux":
        return f"it needs Linux, and this is {platform.system()}"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"it needs the order of stores that x86-64 promises, and this machine is {platform.machine()}"
    return None


def share(store: Store, rank: int, shape: Shape, refusal: str | None = None) -> Segment | str:
    """The segment of the ranks 0 to `shape.size` - 1, or why there is none: the same answer on every rank.

    Collective, through the `store`, which must be this group's own (a prefix). `refusal`: why this rank will not. Raises what
    the store raises for ranks that never come.
    """
    reason = unsuitable()
    refusal = refusal or (reason and f"on rank {rank}, {reason}")
    turn = store.add(f"shm/turn/{rank}", 1)  # a store may outlive a group, and what was said about that one
    found: Segment | str = ""
    for attempt, make in enumerate((_memfd, _shm_file)):
        handshake = _Handshake(store, f"shm/{turn}/{attempt}", rank, shape, refusal)
        found = handshake.lead(make) if rank == 0 else handshake.follow()
        if isinstance(found, Segment):
            break
    return found


def _memfd(size: int) -> tuple[int, str]:
    file = os.memfd_create("shardwise-shm", os.MFD_CLOEXEC)
    os.ftruncate(file, size)
    return file, f"/proc/{os.getpid()}/fd/{file}"


def _shm_file(size: int) -> tuple[int, str]:
    path = f"{_FILES}/shardwise-{secrets.token_hex(16)}"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(file, 0, size)  # now, as an error: later, a full file system would be a fatal signal
    except OSError:
        os.close(file)
        os.unlink(path)
        raise
    return file, path


@dataclass(frozen=True, slots=True)
class _Handshake:
    """One try: rank 0 offers, the others answer, rank 0 decides."""

    store: Store
    prefix: str
    rank: int
    shape: Shape
    refusal: str | None

    def lead(self, make: Callable[[int], tuple[int, str]]) -> Segment | str:
        """Rank 0's part."""
        segment, path, reason = None, "", self.refusal
        if reason is None:
            try:
                file, path = make(self.shape.bytes)
                segment = Segment(file, self.shape, 0)
                segment.sign()
            except OSError as error:
                reason = f"rank 0 could not make it: {error}"
        try:
            self._say("offer", json.dumps({"path": path, "reason": reason}))
            for rank in range(1, self.shape.size):
                answer = json.loads(self._hear(f"answer/{rank}"))
                if reason is None and segment is not None:
                    seen = answer["proof"] == segment.prove(rank) and segment.is_alive(rank)
                    reason = None if seen else answer["reason"] or f"rank {rank} does not see the memory of rank 0"
        finally:
            if path.startswith(_FILES):
                os.unlink(path)
        self._say("verdict", reason or "")
        return _kept(segment, reason)

    def follow(self) -> Segment | str:
        """The part of every other rank."""
        offer = json.loads(self._hear("offer"))
        segment, proof, reason = None, "", offer["reason"] or self.refusal
        if reason is None:
            try:
                segment = Segment(_opened(offer["path"], self.shape.bytes), self.shape, self.rank)
                proof = segment.prove(self.rank) if segment.is_alive(0) else ""
            except OSError as error:
                reason = f"rank {self.rank} cannot open the memory of rank 0, as on another host: {error}"
        self._say(f"answer/{self.rank}", json.dumps({"proof": proof, "reason": reason}))
        return _kept(segment, self._hear("verdict") or None)

    def _say(self, key: str, value: str) -> None:
        self.store.set(f"{self.prefix}/{key}", value)

    def _hear(self, key: str) -> str:
        return str(self.store.get(f"{self.prefix}/{key}").decode())


def _opened(path: str, size: int) -> int:
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if os.fstat(file).st_size != size:  # the same number in another host's /proc
        os.close(file)
        raise OSError(f"{path} is something else here")
    return file


def _kept(segment: Segment | None, reason: str | None) -> Segment | str:
    if reason is None and segment is not None:
        return segment
    if segment is not None:
        segment.close()
    return reason or "rank 0 could not make it"
