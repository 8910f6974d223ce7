"""The collectives of tensor parallelism, each with its dual as backward.

What a value is on the tp axis (the vocabulary of meta-pytorch/spmd_types):

    R     replicated, its gradient partial          I   replicated, its gradient the same on every rank
    S(d)  split along dim d                         P   a pending sum

    function               forward                     backward         dual
    copy_to_tp             identity        I -> R      all-reduce       reduce_from_tp   (Megatron's f)
    reduce_from_tp         all-reduce      P -> I      identity         copy_to_tp       (Megatron's g)
    scatter_to_tp          slice           I -> S(d)   all-gather       gather_from_tp
    gather_from_tp         all-gather      S(d) -> I   slice            scatter_to_tp
    gather_from_sp         all-gather      S(d) -> R   reduce-scatter   reduce_scatter_to_sp
    reduce_scatter_to_sp   reduce-scatter  P -> S(d)   all-gather       gather_from_sp
    all_to_all             all-to-all                  all-to-all       itself

The backward of each calls its dual's public function, so double backward works, and a breakpoint set in a function here stops
in forward and backward alike. Where no gradient can flow no autograd node is made. The classes are called as the functions are:
their names are what a profiler shows. f and g are from Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053), the sequence
parallel pair from Korthikanti et al. 2022 (arXiv:2205.05198).
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, Union

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.nn.functional import pad

from shardwise.compiled import SYNCHRONOUS, traced_all_gather, traced_all_reduce, traced_reduce_scatter
from shardwise.errors import ShardwiseError, describe

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Sizes = tuple[int, ...]
Axis = Union["DeviceMesh", str]
"""The ranks of a collective: a mesh of one dim, or, for code that a compiler traces, the name of its process group."""

# Renamed in torch 2.13, where the old names warn.
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_ALL_REDUCE = dist.all_reduce


def copy_to_tp(x: Tensor, mesh: Axis) -> Tensor:
    """I -> R: `x` as it is; backward sums the ranks' partial gradients (Megatron's f).

    Shapes: any, unchanged. Without gradient the very same object comes back.
    """
    return CopyToTP.apply(x, mesh) if _needs_grad(x) else x


def reduce_from_tp(x: Tensor, mesh: Axis) -> Tensor:
    """P -> I: sum over the ranks of `mesh`; backward is the identity (Megatron's g).

    Consumes `x`: where that is safe (a contiguous tensor, not a leaf, not a view) the sum is written into it, and autograd is
    told so.
    Shapes: any, unchanged; any dtype that the backend reduces. Each rank's gradient is already whole, so summing it again (as
    torch's functional all-reduce does) would multiply it by the size.
    """
    if _needs_grad(x):
        total: Tensor = ReduceFromTP.apply(x, mesh)
        return total
    # A view shares its memory, and a parameter is a leaf here too (no_grad): neither is the caller's to give away.
    kept = x.requires_grad or (not torch.compiler.is_dynamo_compiling() and x._is_view())
    x = x.clone(memory_format=torch.contiguous_format) if kept else x.contiguous()
    _sum_over_ranks(x, mesh)
    return x


def scatter_to_tp(x: Tensor, mesh: DeviceMesh, dim: int = -1, sizes: Sizes | None = None) -> Tensor:
    """I -> S(dim): this rank's slice of a replicated `x`; backward gathers the slices' gradients.

    Shapes: (..., n, ...) -> (..., sizes[rank], ...); `sizes` are the ranks' lengths along `dim`, by default n / size each.
    """
    sizes = sizes or even_sizes(x.shape[dim], mesh.size())
    return ScatterToTP.apply(x, mesh, dim, sizes) if _needs_grad(x) else _slice(x, mesh, dim, sizes)


def gather_from_tp(x: Tensor, mesh: DeviceMesh, dim: int = -1, sizes: Sizes | None = None) -> Tensor:
    """S(dim) -> I: the ranks' slices put together, on every rank; backward takes this rank's slice of the gradient.

    Shapes: (..., sizes[rank], ...) -> (..., sum(sizes), ...); `sizes` by default all as this rank's.
    """
    sizes = sizes or (x.shape[dim],) * mesh.size()
    return GatherFromTP.apply(x, mesh, dim, sizes) if _needs_grad(x) else _all_gather(x, mesh, dim, sizes)


def gather_from_sp(x: Tensor, mesh: DeviceMesh, dim: int = 1, sizes: Sizes | None = None) -> Tensor:
    """S(dim) -> R: the ranks' slices put together; backward sums the partial gradients and keeps this rank's slice.

    Shapes as `gather_from_tp`. For a sequence-parallel input of a column-wise layer.
    """
    sizes = sizes or (x.shape[dim],) * mesh.size()
    return GatherFromSP.apply(x, mesh, dim, sizes) if _needs_grad(x) else _all_gather(x, mesh, dim, sizes)


def reduce_scatter_to_sp(x: Tensor, mesh: DeviceMesh, dim: int = 1, sizes: Sizes | None = None) -> Tensor:
    """P -> S(dim): the sum over the ranks, of which each keeps its slice; backward gathers the slices' gradients.

    Shapes as `scatter_to_tp`. For the output of a row-wise layer in a sequence-parallel region.
    """
    sizes = sizes or even_sizes(x.shape[dim], mesh.size())
    return ReduceScatterToSP.apply(x, mesh, dim, sizes) if _needs_grad(x) else _reduce_scatter(x, mesh, dim, sizes)


def all_to_all(x: Tensor, mesh: DeviceMesh, receive: Sizes, send: Sizes) -> Tensor:
    """Rows to other ranks: the first `send[0]` rows of `x` to rank 0, the next to rank 1, ...; backward sends the gradients
    home.

    Shapes: (sum(send), ...) -> (sum(receive), ...), rows in the order of the ranks that they came from.
    """
    return AllToAll.apply(x, mesh, receive, send) if _needs_grad(x) else _exchange(x, mesh, receive, send)


def even_sizes(length: int, size: int) -> Sizes:
    """The lengths of `size` contiguous pieces, as even as can be, the first ones longer."""
    share, rest = divmod(length, size)
    return tuple(share + (rank < rest) for rank in range(size))


def _needs_grad(x: Tensor) -> bool:
    if not torch.compiler.is_dynamo_compiling() and forward_ad._current_level >= 0:
        raise ShardwiseError(
            describe(
                "Forward-mode differentiation (torch.func.jvp, jacfwd, dual tensors) of a parallel model is not possible.",
                why="tangents would stay this rank's part",
                fix="torch.autograd.grad(..., create_graph=True), twice for a product with the Jacobian",
            )
        )
    return x.requires_grad and torch.is_grad_enabled()


class CopyToTP(torch.autograd.Function):
    """Identity; backward: all-reduce."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Axis) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Cloned, because autograd may hand the same gradient object to a sibling (the other operand of an addition).
        total = grad.clone(memory_format=torch.contiguous_format)
        if grad.requires_grad:  # of a backward that is differentiated again
            return reduce_from_tp(total, ctx.mesh), None
        _sum_over_ranks(total, ctx.mesh)
        return total, None


class ReduceFromTP(torch.autograd.Function):
    """All-reduce, in place where that is safe; backward: identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Axis) -> Tensor:
        ctx.mesh = mesh
        # Unmarked, an in-place sum silently corrupts what the operation before saved for its backward (exp saves its output).
        if not torch.compiler.is_dynamo_compiling() and x.is_contiguous() and not x.is_leaf and not x._is_view():
            ctx.mark_dirty(x)
            _sum_over_ranks(x, mesh)
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        _sum_over_ranks(_written(x), mesh)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (copy_to_tp(grad, ctx.mesh) if grad.requires_grad else grad), None


class ScatterToTP(torch.autograd.Function):
    """Slice; backward: all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, dim: int, sizes: Sizes) -> Tensor:
        ctx.call = (mesh, dim, sizes)
        return _slice(x, mesh, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return gather_from_tp(grad, *ctx.call), None, None, None


class GatherFromTP(torch.autograd.Function):
    """All-gather; backward: slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, dim: int, sizes: Sizes) -> Tensor:
        ctx.call = (mesh, dim, sizes)
        return _all_gather(x, mesh, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return scatter_to_tp(grad, *ctx.call), None, None, None


class GatherFromSP(torch.autograd.Function):
    """All-gather; backward: reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, dim: int, sizes: Sizes) -> Tensor:
        ctx.call = (mesh, dim, sizes)
        return _all_gather(x, mesh, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return reduce_scatter_to_sp(grad, *ctx.call), None, None, None


class ReduceScatterToSP(torch.autograd.Function):
    """Reduce-scatter; backward: all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, dim: int, sizes: Sizes) -> Tensor:
        ctx.call = (mesh, dim, sizes)
        return _reduce_scatter(x, mesh, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return gather_from_sp(grad, *ctx.call), None, None, None


class AllToAll(torch.autograd.Function):
    """All-to-all; backward: all-to-all the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, receive: Sizes, send: Sizes) -> Tensor:
        ctx.mesh, ctx.receive, ctx.send = mesh, receive, send
        return _exchange(x, mesh, receive, send)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(grad, ctx.mesh, receive=ctx.send, send=ctx.receive), None, None, None


def _sum_over_ranks(x: Tensor, mesh: Axis) -> None:
    """All-reduce `x` in place, past what `dist.all_reduce` looks at before it, which costs more than the call to the group.

    Not where a compiler must see that call, where somebody watches (`dist.all_reduce` was replaced), or for complex numbers.
    """
    if torch.compiler.is_compiling():
        if x.is_cpu and not x.is_complex():
            x.copy_(traced_all_reduce(x, mesh if isinstance(mesh, str) else mesh.get_group().group_name))
        else:
            dist.all_reduce(x, group=mesh if isinstance(mesh, str) else mesh.get_group())
        return
    group = _resolve_process_group(mesh) if isinstance(mesh, str) else mesh.get_group()  # type: ignore[arg-type]
    if dist.all_reduce is not _ALL_REDUCE or x.is_complex():
        dist.all_reduce(x, group=group)
    else:
        group.allreduce([x], SYNCHRONOUS).wait()


def _slice(x: Tensor, mesh: DeviceMesh, dim: int, sizes: Sizes) -> Tensor:
    rank = mesh.get_local_rank()
    return x.narrow(dim, sum(sizes[:rank]), sizes[rank]).clone(memory_format=torch.contiguous_format)


def _all_gather(x: Tensor, mesh: DeviceMesh, dim: int, sizes: Sizes) -> Tensor:
    dim, longest = dim % x.dim(), max(sizes)
    if torch.compiler.is_compiling() and min(sizes) == longest:
        return traced_all_gather(x, dim, mesh.get_group().group_name, len(sizes))
    if x.shape[dim] < longest:
        x = pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, longest - x.shape[dim]))
    x = x.contiguous()
    full = (*x.shape[:dim], len(sizes) * longest, *x.shape[dim + 1 :])
    in_order = min(sizes) == longest and all(length == 1 for length in x.shape[:dim])
    # Never a view of what was gathered: autograd lets nobody write to a view that a Function gives (OLMo clamps q, k and v).
    gathered = x.new_empty(full if in_order else (len(sizes), *x.shape))
    gather_into(gathered.view(len(sizes) * x.shape[0], *x.shape[1:]), x, group=mesh.get_group())
    if in_order:
        return gathered
    return torch.cat([part.narrow(dim, 0, length) for part, length in zip(gathered, sizes, strict=True)], dim)


def _reduce_scatter(x: Tensor, mesh: DeviceMesh, dim: int, sizes: Sizes) -> Tensor:
    dim, longest = dim % x.dim(), max(sizes)
    if torch.compiler.is_compiling() and min(sizes) == longest:
        return traced_reduce_scatter(x, dim, mesh.get_group().group_name, len(sizes))
    starts = (0, *accumulate(sizes[:-1]))
    parts = [x.narrow(dim, start, length) for start, length in zip(starts, sizes, strict=True)]
    if min(sizes) < longest:
        fill = (0, 0) * (x.dim() - 1 - dim)
        parts = [pad(part, (*fill, 0, longest - part.shape[dim])) for part in parts]
    stacked = torch.cat(parts, 0) if dim else torch.cat(parts, 0).contiguous()
    mine = x.new_empty(parts[0].shape)
    reduce_scatter_into(_written(mine), stacked, group=mesh.get_group())
    length = sizes[mesh.get_local_rank()]
    return mine if length == longest else mine.narrow(dim, 0, length).clone(memory_format=torch.contiguous_format)


def _exchange(x: Tensor, mesh: DeviceMesh, receive: Sizes, send: Sizes) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(_written(out), x.contiguous(), list(receive), list(send), group=mesh.get_group())
    return out


def _written(x: Tensor) -> Tensor:
    """`x` to be written to, inside a Function that returns it.

    Traced by torch 2.11, a Function that writes to the very tensor that it returns loses the gradient of that, silently
    (pytorch/pytorch#180642); through a view it does not.
    """
    return x.view_as(x)
