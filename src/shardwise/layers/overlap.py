"""The all-reduce of an input's gradient, while the weights' gradients of the same linears are computed.

    x ── wait ── start ──┬── product(q) ── ...     forward: the values of `copy_to_tp` and of the linears
          :       :      ├── product(k) ── ...     backward: each product gives its input's gradient and keeps what its
          :       :      └── product(v) ── ...     weight's gradient takes; `start` starts the all-reduce of the sum; the
    weight gradients of q, k, v                    weight gradients are computed; `wait` waits, and hands the sum on to x

All dependencies are ordinary edges of autograd: a weight's gradient needs its product, x's needs `wait`, that needs `start`.
The overlap comes from the order: of the nodes that are ready autograd runs first the one that was made last, and forward makes
them as `wait`, weight gradients, `start`, products. So the weights have their gradients before x has its own, as without, and
hooks (DDP's, FSDP2's, a user's) see what they see without; nothing more is sent, in the same order. The asynchronous
all-reduce is Megatron-LM's (Narayanan et al. 2021, arXiv:2104.04473).
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear

from shardwise.collectives import copy_to_tp, reduce_from_tp
from shardwise.layers.base import ParallelStyle
from shardwise.layers.region import Region

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class OverlappedLinear(ParallelStyle):
    """Mixed in between a column-wise style and a linear layer: its product, with the weight's gradient computed late.

    X (..., in) R -> Y (..., out/tp) S(-1), as the layer's own forward, which runs where nothing can overlap: without gradient,
    with frozen weights, under torch.compile, and on a weight that is none of the layer's own parameters (parametrized).
    """

    def forward(self, input: Tensor) -> Tensor:
        late = None
        if not torch.compiler.is_dynamo_compiling() and isinstance(region := self._tp.region, OverlappedRegion):
            late = region.late(self, input)
        output: Tensor
        if late is None:
            output = super().forward(input)
        else:
            output = ColwiseProduct.apply(input, late.token, late)
        return output


class OverlappedRegion(Region):
    """A `Region` whose input copy lets its all-reduce overlap with the weight gradients of the linears that joined.

    Args:
        local_dropout: as in `Region`.
        alone: the region of one layer, which nothing closes.
    """

    def __init__(self, local_dropout: bool = False, alone: bool = False) -> None:
        super().__init__(local_dropout)
        self._alone = alone
        # Weak, or a model would live until Python looks for cycles, and its memory with it.
        self._members: list[weakref.ref[OverlappedLinear]] = []
        self._late: dict[OverlappedLinear, LateGradient] = {}

    def join(self, module: OverlappedLinear) -> None:
        """From now on the all-reduce waits for the weight gradient of `module` where both read the same tensor."""
        self._members.append(weakref.ref(module))

    def enter(self, x: Tensor, mesh: DeviceMesh, training: bool) -> Tensor:
        """As `Region.enter`: the same value, the same collectives."""
        if torch.compiler.is_dynamo_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
            return super().enter(x, mesh, training)
        last, version = self._last, x._version
        if last is not None and last[0] is x and last[1] == version:
            return last[2]
        if self._local_dropout:
            super().enter(x.detach(), mesh, training)  # for its random stream: what has no gradient is not copied
        entered = self._copy(x, mesh)
        self._last = (x, version, entered)
        return entered

    def late(self, module: OverlappedLinear, entered: Tensor) -> LateGradient | None:
        """Where the weight gradient of `module`'s product with `entered` is to be left; None where it can't be late."""
        last, late = self._last, self._late.get(module)
        if self._alone:
            self.leave()
        if late is None or last is None or last[2] is not entered or not late.belongs_to(module):
            return None
        return late

    def leave(self) -> None:
        """As `Region.leave`."""
        super().leave()
        self._late = {}

    def _copy(self, x: Tensor, mesh: DeviceMesh) -> Tensor:
        members = [module for member in self._members if (module := member()) is not None and _can_be_late(module)]
        if not members:
            self._late = {}
            return copy_to_tp(x, mesh)
        flight = _Flight()
        x = CopyToTPWait.apply(x, flight)
        self._late = {module: LateGradient(module) for module in members}
        entered: Tensor = CopyToTPStart.apply(x, mesh, flight)
        return entered

    def __deepcopy__(self, memo: dict[int, Any]) -> OverlappedRegion:
        copied = memo[id(self)] = OverlappedRegion(self._local_dropout, self._alone)
        for member in self._members:
            if (module := member()) is not None:
                copied.join(copy.deepcopy(module, memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        members = [module for member in self._members if (module := member()) is not None]
        return OverlappedRegion, (self._local_dropout, self._alone), members

    def __setstate__(self, members: list[OverlappedLinear]) -> None:
        for module in members:
            self.join(module)


class LateGradient:
    """What the gradients of one layer's weight and bias take, from the backward of its products to the node that computes
    them.

    `token` is that node's output: a product that reads it has an edge to the node, so the node runs after it.
    """

    def __init__(self, module: OverlappedLinear) -> None:
        self.weight, self.bias = _weight_and_bias(module)
        self.transposed = module._tp.transposed
        self.calls = 0
        self.parts: dict[int, tuple[Tensor, Tensor]] = {}
        self.token: Tensor = WeightGradient.apply(self.weight, self.bias, self.parts, self.transposed)

    def belongs_to(self, module: OverlappedLinear) -> bool:
        """Whether `module` still has the weight and the bias that the node was made for: FSDP2 exchanges them."""
        weight, bias = _weight_and_bias(module)
        return weight is self.weight and bias is self.bias


class _Flight:
    """An all-reduce that was started, and not yet waited for."""

    __slots__ = ("total", "work")

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.work: dist.Work | None = None


class CopyToTPWait(torch.autograd.Function):
    """Identity; backward: the end of the all-reduce that `CopyToTPStart` started."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight: _Flight = ctx.flight
        total, work = flight.total, flight.work
        flight.total = flight.work = None
        if work is not None:
            work.wait()
        return grad if total is None else total, None


class CopyToTPStart(torch.autograd.Function):
    """Identity; backward: all-reduce, started."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, flight: _Flight) -> Tensor:
        ctx.mesh, ctx.flight = mesh, flight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            return reduce_from_tp(total, ctx.mesh), None, None
        flight: _Flight = ctx.flight
        flight.total, flight.work = total, dist.all_reduce(total, group=ctx.mesh.get_group(), async_op=True)
        # Not `total`, which is being written to: autograd may look at what passes through it (anomaly detection does).
        return grad, None, None


class ColwiseProduct(torch.autograd.Function):
    """Y = X Aᵀ + b; backward: X's gradient, while what A's and b's take is left for `WeightGradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, late: LateGradient) -> Tensor:
        # The weight is no argument: an edge to it would bring nothing but a second gradient, None, to be added to its own.
        ctx.parts, ctx.call, ctx.transposed = late.parts, late.calls, late.transposed
        late.calls += 1
        ctx.save_for_backward(x, late.weight)
        ctx.set_materialize_grads(False)
        cached = torch.is_autocast_enabled(x.device.type) and torch.is_autocast_cache_enabled()
        if not cached:
            return _product(x, late)
        # Grad mode is off here: older autocasts would keep a cast weight without gradient for whoever reads the weight next
        # (pytorch/pytorch#165068).
        torch.set_autocast_cache_enabled(False)
        try:
            return _product(x, late)
        finally:
            torch.set_autocast_cache_enabled(True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        rows = _rows(grad)
        ctx.parts[ctx.call] = (rows, x)
        of_x = rows.mm(_as(weight.t() if ctx.transposed else weight, grad.dtype)).view(x.shape)
        return _as(of_x, x.dtype), None, None


class WeightGradient(torch.autograd.Function):
    """An empty token; backward: the gradients of a linear layer's weight and bias, of what its products left in `parts`."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, parts: dict[int, tuple[Tensor, Tensor]], transposed: bool
    ) -> Tensor:
        ctx.parts, ctx.transposed = parts, transposed
        ctx.dtypes = (weight.dtype, weight.dtype if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        return weight.new_empty(())

    @staticmethod
    def backward(ctx: Any, token: None) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_weight, of_bias = None, None
        while ctx.parts:
            _, (grad, x) = ctx.parts.popitem()
            if ctx.needs_input_grad[0]:
                x = _as(_rows(x), grad.dtype)
                part = _as(x.t().mm(grad) if ctx.transposed else grad.t().mm(x), ctx.dtypes[0])
                of_weight = part if of_weight is None else of_weight + part
            if ctx.needs_input_grad[1]:
                part = _as(grad.sum(0), ctx.dtypes[1])
                of_bias = part if of_bias is None else of_bias + part
        return of_weight, of_bias, None, None


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Under autocast the gradient has another dtype than the weight and the input. Asking is cheaper than a cast to the same.
    return x if x.dtype is dtype else x.to(dtype)


def _can_be_late(module: OverlappedLinear) -> bool:
    weight, bias = _weight_and_bias(module)
    # A tensor of another type (a shard of FSDP2's that has not been gathered yet) has operations of its own.
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        return False
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _weight_and_bias(module: nn.Module) -> tuple[Any, Tensor | None]:
    return module._parameters.get("weight"), module._parameters.get("bias")


def _product(x: Tensor, late: LateGradient) -> Tensor:
    weight, bias = late.weight, late.bias
    if not late.transposed:
        return linear(x, weight, bias)
    rows = _rows(x)
    output = rows.mm(weight) if bias is None else torch.addmm(bias, rows, weight)
    return output.view(*x.shape[:-1], weight.shape[1])


def _rows(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
