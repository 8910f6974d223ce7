"""Look at every collective as it is called, and `trace_collectives`, which writes them down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from shardwise.debug.operators import Call, read_call, wait_for
from shardwise.debug.place import Places
from shardwise.debug.record import Collective, CollectiveTrace, describe_group


class Watch(TorchDispatchMode):
    """Hands each collective to a function of the caller's, in forward and backward, eager and compiled.

    Args:
        seen: gets what is known of the call, and what carries it out and gives its result.
    """

    def __init__(self, seen: Callable[[Collective, Call, Callable[[], Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen
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
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._places.stop()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every operator comes by here."""
        kwargs = kwargs or {}
        call = read_call(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        return self._seen(self._describe(call), call, lambda: func(*args, **kwargs))

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
def trace_collectives() -> Iterator[CollectiveTrace]:
    """In the block, every collective of this rank is written down, in order.

        with shardwise.trace_collectives() as trace:
            model(input_ids=ids, labels=ids).loss.backward()
        print(trace)  # a table for each kind of layer; trace.save(path) writes JSON; trace.diff(other) compares

    Of this thread, and of autograd's threads for it: the model's own collectives and anybody else's (DDP's, an optimizer's).
    Each is waited for, so that its duration is its own: what an asynchronous one would hide it does not hide here. Compiled
    code is traced as it runs, without the names of modules. Outside of such a block nothing is done, and costs nothing. Every
    rank may do it, or one alone.
    """
    trace = CollectiveTrace([])

    def seen(found: Collective, call: Call, run: Callable[[], Any]) -> Any:
        _synchronize(call)
        began = time.perf_counter()
        result = run()
        wait_for(result)
        _synchronize(call)
        trace.add(found, time.perf_counter() - began)
        return result

    with Watch(seen):
        yield trace


def _synchronize(call: Call) -> None:
    for device in {tensor.device for tensor in call.inputs if tensor.device.type not in ("cpu", "meta")}:
        torch.accelerator.synchronize(device)
