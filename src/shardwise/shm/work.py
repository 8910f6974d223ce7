"""Operations in flight: begun at once, finished by whoever waits for them, or by a thread where nobody does.

begin       the first chunk is written and published, unless others are still in front: they go one after the other
wait()      finishes those in front, then this one
the thread  looks after those that nobody waits for, so that a legal program never hangs on them, and futures complete
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor
from torch._C._distributed_c10d import Work
from torch.futures import Future

from shardwise.shm.calls import Call
from shardwise.shm.channel import Channel
from shardwise.shm.errors import BrokenGroupError
from shardwise.shm.mail import Mail

# How long an operation is left to its own `wait`, and how often the thread looks while there are any, in seconds.
_PATIENCE = 1e-3
_EAGER = 5e-5
# After so many looks without any the thread sleeps until it is called.
_IDLE = 200


class Operation(Work):
    """The handle of one operation. `steps` are run by the queue; `outputs` is what its future gives."""

    def __init__(self, queue: Queue | None, call: Call, steps: Iterator[None], outputs: list[Tensor]) -> None:
        super().__init__()
        self.call, self.steps, self.outputs = call, steps, outputs
        self.done = False
        self.error: BaseException | None = None
        self.future: Future[list[Tensor]] | None = None
        self._queue = queue

    @classmethod
    def finished(cls) -> Operation:
        """The handle of what has been done already."""
        operation = cls(None, Call("barrier"), iter(()), [])
        operation.done = True
        return operation

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Until the tensors hold the result. Raises what went wrong; always True otherwise."""
        if not self.done and self._queue is not None:
            self._queue.finish(self)
        if self.error is not None:
            raise self.error
        return True

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return self.done

    def is_success(self) -> bool:
        """Whether it is done, and nothing went wrong."""
        return self.done and self.error is None

    def exception(self) -> BaseException | None:
        """What went wrong."""
        return self.error

    def result(self) -> list[Tensor]:
        """The output tensors."""
        return self.outputs

    def get_future(self) -> Future[list[Tensor]]:
        """A future of the output tensors, which completes without anybody waiting for it."""
        if self.future is None:
            self.future = Future()
            if self._queue is not None:
                self._queue.promise(self)
            if self.done:
                self.settle()
        return self.future

    def settle(self) -> None:
        """Complete the future, once."""
        future = self.future
        if future is not None and not future.done():
            with contextlib.suppress(RuntimeError):  # completed by another thread just now
                if self.error is None:
                    future.set_result(self.outputs)
                elif isinstance(self.error, Exception):
                    future.set_exception(self.error)  # type: ignore[arg-type]  # annotated as the result's type


class Queue:
    """The operations of one group, in the order in which they were called."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._pending: deque[Operation] = deque()
        self._begun = False  # whether the first of them has published a step
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._called = threading.Event()
        self._eager = False
        self._mail: Mail | None = None

    @property
    def mail(self) -> Mail:
        """The messages of this group."""
        self._check()
        with self._lock:
            self._channel.check()
            if self._mail is None:
                self._mail = Mail(self._channel)
            return self._mail

    def run(self, call: Call, steps: Iterator[None]) -> None:
        """Run an operation to its end, after those before it."""
        channel = self._channel
        self._check()
        done: list[Operation] = []
        try:
            with self._lock:
                if self._pending:
                    self._drain(None, done)
                channel.check()
                channel.begin(call)
                self._drive(steps)
        finally:
            for operation in done:
                operation.settle()

    def begin(self, call: Call, steps: Iterator[None], outputs: list[Tensor]) -> Operation:
        """Put an operation at the end, and begin it if it is the first."""
        self._check()
        operation = Operation(self, call, steps, outputs)
        with self._lock:
            self._channel.check()
            self._pending.append(operation)
            if len(self._pending) == 1:
                self._begin_first()
        self.call_thread()
        return operation

    def finish(self, operation: Operation) -> None:
        """Finish everything up to `operation`; an error becomes that of the operation."""
        done: list[Operation] = []
        self._check()
        with self._lock:
            self._drain(operation, done)
        for other in done:
            other.settle()

    def promise(self, operation: Operation) -> None:
        """Somebody waits for the future of `operation`: see to it soon."""
        self._eager = True
        self.call_thread()

    def close(self) -> None:
        """End the thread, and leave the group."""
        if self._pid != os.getpid():
            return
        thread, self._thread = self._thread, None
        self._called.set()
        with self._lock:
            self._channel.leave()
            done = self._give_up()
            if self._mail is not None:
                self._mail.look()
        for operation in done:
            operation.settle()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise BrokenGroupError("the process group belongs to the process from which this one was forked.")

    def _drive(self, steps: Iterator[None]) -> None:
        channel = self._channel
        try:
            for _ in steps:
                channel.wait()
        except BaseException as error:
            self._broken_by(error)
            raise

    def _broken_by(self, error: BaseException) -> None:
        """In the middle of a call, whatever it was, the others wait for what will not come."""
        if self._channel.failure is None:
            with contextlib.suppress(BrokenGroupError):
                self._channel.fail(BrokenGroupError(self._channel.interrupted(error)))

    def _begin_first(self) -> None:
        operation = self._pending[0]
        self._begun = True
        try:
            self._channel.begin(operation.call)
            next(operation.steps, None)
        except BaseException as error:
            self._broken_by(error)
            self._end(operation, error)
            raise

    def _drain(self, last: Operation | None, done: list[Operation]) -> None:
        """Finish the operations up to `last`, or all. Their tensors may be inference tensors, and this not their mode."""
        with torch.inference_mode():
            self._drain_in_order(last, done)

    def _drain_in_order(self, last: Operation | None, done: list[Operation]) -> None:
        while self._pending and not (last is not None and last.done):
            operation = self._pending[0]
            try:
                self._channel.check()
                if not self._begun:
                    self._begin_first()
                self._channel.wait()
                self._drive(operation.steps)
            except BaseException as error:
                self._broken_by(error)
                done.extend(self._give_up(error))
                if not isinstance(error, Exception):
                    raise
                return
            self._end(operation, None)
            done.append(operation)

    def _end(self, operation: Operation, error: BaseException | None) -> None:
        operation.error = error
        operation.done = True
        self._begun = False
        if self._pending and self._pending[0] is operation:
            self._pending.popleft()

    def _give_up(self, error: BaseException | None = None) -> list[Operation]:
        given_up = list(self._pending)
        for operation in given_up:
            self._end(operation, error or self._channel.failure)
        return given_up

    def call_thread(self) -> None:
        """Have the thread look after what is in flight."""
        if self._thread is None:
            self._thread = threading.Thread(target=_look_after, args=(weakref.ref(self), self._called), daemon=True)
            self._thread.name = "shardwise-shm"
            self._thread.start()
        if not self._called.is_set():
            self._called.set()

    def look(self) -> bool:
        """The thread's: go on with what is ready, without waiting for anybody. Whether anything is left."""
        done: list[Operation] = []
        if self.is_empty:
            self._eager = False
            return False
        if self._mail is not None:
            self._mail.look()
        if self._lock.acquire(blocking=False):  # who holds it is at it
            try:
                self._advance(done)
            finally:
                self._lock.release()
        for operation in done:
            operation.settle()
        return True

    def _advance(self, done: list[Operation]) -> None:
        while self._pending:
            operation = self._pending[0]
            try:
                self._channel.check()
                if not self._begun:
                    self._begin_first()
                if not self._channel.is_ready():
                    self._channel.patrol()
                    return
                self._channel.compare()
                more = next(operation.steps, self) is not self
            except BaseException as error:
                self._broken_by(error)
                done.extend(self._give_up(error))
                return
            if not more:
                self._end(operation, None)
                done.append(operation)

    @property
    def calls(self) -> int:
        """How many have been called."""
        return self._channel.calls + len(self._pending) - self._begun

    @property
    def pause(self) -> float:
        """Seconds until the thread looks again."""
        return _EAGER if self._eager else _PATIENCE

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in flight."""
        return not self._pending and (self._mail is None or self._mail.is_empty)

    @property
    def is_closed(self) -> bool:
        """Whether the thread is to end."""
        return self._thread is not threading.current_thread()


def _look_after(reference: weakref.ref[Queue], called: threading.Event) -> None:
    idle = 0
    with torch.inference_mode():  # the tensors of others may be inference tensors, which may be written nowhere else
        while True:
            queue = reference()
            if queue is None or queue.is_closed:
                return
            pause = queue.pause
            time.sleep(pause)
            idle = 0 if queue.look() else idle + 1
            if idle > _IDLE:
                called.clear()
                if not queue.is_empty:  # began just before, when the flag was still set
                    continue
                del queue  # so that a group that nobody holds any more goes, and its thread with it
                called.wait(1.0)
                idle = 0
