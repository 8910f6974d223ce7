"""Look at every collective as it is called, and `trace_collectives`, which writes them down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from shardwise.debug.agree import Agreement
from shardwise.debug.operators import Call, agreed_shapes, read_call, wait_for
from shardwise.debug.place import Places
from shardwise.debug.record import Collective, CollectiveTrace, describe_group
from shardwise.shm.watched import CollectiveWatcher


class Watch(CollectiveWatcher):
    """Hands each collective to a function of the caller's, in forward and backward, eager and compiled.

    Args:
        seen: gets what is known of the call, and what carries it out and gives its result.
    """

    def __init__(self, seen: Callable[[Collective, Call, Callable[[], Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen, self._over = seen, False
        self._places = Places(lambda: any(mode is self for mode in _get_current_dispatch_mode_stack()))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs as it is, and its collectives are seen."""
        return True

    def __enter__(self) -> Watch:
        self._places.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Look no more. Modes are a stack, of which only the last can go: one below stays there, and sees nothing."""
        self._over = True
        self._places.stop()
        while (modes := _get_current_dispatch_mode_stack()) and isinstance(last := modes[-1], Watch) and last._over:
            TorchDispatchMode.__exit__(last, *error)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every operator comes by here."""
        kwargs = kwargs or {}
        call = None if self._over else read_call(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        return self._seen(self._describe(call), call, lambda: func(*args, **kwargs))

    def collective(
        self, kind: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], group: dist.ProcessGroup, run: Callable[[], Any]
    ) -> Any:
        """A group in Python is called, which torch shows to no mode."""
        if self._over:
            return run()
        call = Call(kind, tuple(inputs), group, agreed_shapes(kind, inputs, outputs))
        return self._seen(self._describe(call), call, run)

    def _describe(self, call: Call) -> Collective:
        phase, module, parameter = self._places.now()
        first = call.inputs[0] if call.inputs else None
        name, ranks = describe_group(call.group)
        return Collective(
            op=call.kind,
            phase=phase,
            module=module,
            parameter=parameter,
            shape=tuple(first.shape) if first is not None else (),
            dtype=str(first.dtype).removeprefix("torch.") if first is not None else "",
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in call.inputs),
            group=name,
            ranks=ranks,
            tensors=len(call.inputs),
        )


@contextmanager
def trace_collectives(*, check: bool = False, timeout: float = 60.0) -> Iterator[CollectiveTrace]:
    """In the block, every collective of this rank is written down, in order.

        with shardwise.trace_collectives() as trace:
            model(input_ids=ids, labels=ids).loss.backward()
        print(trace)  # a table for each kind of layer; trace.save(path) writes JSON; trace.diff(other) compares

    Of this thread, and of autograd's threads for it: the model's own collectives and anybody else's (DDP's, an optimizer's).
    Each is waited for, so that its duration is its own: what an asynchronous one would hide it does not hide here. Compiled
    code is traced as it runs, without the names of modules. Outside of such a block nothing is done, and costs nothing. Every
    rank may do it, or one alone.

    Args:
        check: compare the ranks before each collective, so that one which differs (in kind, module, phase, shape or dtype) is
            an error on all of them, with where each stands, and not a hang or wrong numbers. Every rank has to do it, then.
        timeout: with `check`, seconds that a rank waits for the others to come to the same collective.

    Raises, with `check`:
        MismatchError: ranks are about to make different collectives. None has begun.
        MissingRankError: a rank did not begin, left the block, waits in another group, or did not come in time: where it
            stands is said.
        MeshError: there is no process group yet.
    """
    trace, agreement = CollectiveTrace([]), Agreement(timeout) if check else None

    def seen(found: Collective, call: Call, run: Callable[[], Any]) -> Any:
        if agreement is not None:
            agreement.before(found, call)
        _synchronize(call)
        began = time.perf_counter()
        result = run()
        wait_for(result)
        _synchronize(call)
        trace.add(found, time.perf_counter() - began)
        return result

    try:
        with Watch(seen):
            yield trace
    except BaseException as error:
        if agreement is not None:
            agreement.leave(error)
        raise
    if agreement is not None:
        agreement.leave(None)


def _synchronize(call: Call) -> None:
    for device in {tensor.device for tensor in call.inputs if tensor.device.type not in ("cpu", "meta")}:
        torch.accelerator.synchronize(device)
