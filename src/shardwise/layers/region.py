"""What happens between a column-wise and a row-wise layer of one module, where activations are local: one input copy, one
random stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from shardwise.collectives import copy_to_tp

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from shardwise.layers.sequence import Stream


class Region:
    """The parallel region of one module: opened by its column-wise children, closed by its row-wise one.

    One `copy_to_tp` for all siblings that read the same tensor: q, k and v read one, gate and up another. The first sibling
    that sees it makes the copy, the others reuse it when they get the very same object, so autograd adds their gradients and
    one all-reduce carries the sum. One activation is held at most, until the region is closed.

    With `local_dropout` the region has a random stream of its own on each rank, as its dropout masks lie on local heads or
    features and must differ, while masks outside must agree (Megatron-LM, arXiv:1909.08053, section 3). The stream's seed is
    drawn from the common one, so that recomputing under activation checkpointing draws the same masks. Under torch.compile the
    ranks keep the common stream: their masks are valid each, and alike.
    """

    def __init__(self, local_dropout: bool = False, stream: Stream | None = None) -> None:
        self._local_dropout = local_dropout
        self._stream = stream
        self._last: tuple[Tensor, int, Tensor] | None = None
        self._common: _RandomState | None = None

    def enter(self, x: Tensor, mesh: DeviceMesh, training: bool) -> Tensor:
        """`copy_to_tp(x, mesh)`, made once for one `x`. Shapes: any, unchanged."""
        if self._local_dropout and training and self._common is None and not torch.compiler.is_dynamo_compiling():
            self._common = _RandomState(x.device)
            self._common.diverge(mesh.get_local_rank())
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x
        if self._stream is not None and self._stream.sizes is not None:  # gathered, its gradient summed, by the module
            return x
        # A tensor that was written to between two siblings is another value in the same object.
        version = 0 if torch.compiler.is_dynamo_compiling() else x._version
        last = self._last
        if last is not None and last[0] is x and last[1] == version:
            return last[2]
        copy = copy_to_tp(x, mesh)
        self._last = (x, version, copy)
        return copy

    def leave(self) -> None:
        """Let go of the activation, and go back to the common random stream."""
        self._last = None
        if self._common is not None:
            self._common.restore()
            self._common = None

    @contextmanager
    def common(self, device: torch.device, rank: int) -> Iterator[None]:
        """The common random stream, in the middle of the region, which goes on with another one of `rank`'s own."""
        if self._common is None:
            yield
            return
        self._common.restore()
        try:
            yield
        finally:
            self._common = _RandomState(device)
            self._common.diverge(rank)

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return Region(self._local_dropout, deepcopy(self._stream, memo))

    def __reduce__(self) -> tuple[type[Region], tuple[bool, Stream | None]]:
        return Region, (self._local_dropout, self._stream)


def drops_out(module: nn.Module) -> bool:
    """Whether `module`, or a part of it, drops out elements when training."""
    rates = [rate for m in module.modules() for key, rate in vars(m).items() if "drop" in key and isinstance(rate, float)]
    return any(rate > 0 for rate in (*rates, *(m.p for m in module.modules() if isinstance(m, _DropoutNd))))


@contextmanager
def local_random_stream(device: torch.device, rank: int) -> Iterator[None]:
    """A random stream of `rank`'s own, which leaves the common one where it was, but for one draw."""
    state = _RandomState(device)
    state.diverge(rank)
    try:
        yield
    finally:
        state.restore()


class _RandomState:
    """The random state of the CPU, and of `device` where that is another one."""

    def __init__(self, device: torch.device) -> None:
        # Drawn before the state is kept, so that the next region gets another seed.
        seed = torch.randint(2**62, ())
        self._seed = int(seed.item()) if type(seed) is torch.Tensor else 0  # a simulation's tensors have no values
        self._device = None if device.type == "cpu" else device
        self._cpu = torch.get_rng_state()
        self._other = torch.get_device_module(device).get_rng_state(device) if self._device is not None else None

    def diverge(self, rank: int) -> None:
        torch.default_generator.manual_seed(self._seed + rank)
        if self._device is not None:
            torch.get_device_module(self._device).manual_seed(self._seed + rank)

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._device is not None:
            torch.get_device_module(self._device).set_rng_state(self._other, self._device)
