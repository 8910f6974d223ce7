"""Parameters whose gradient is more than what one rank's backward gives: summed over ranks, or averaged over batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from shardwise.collectives import copy_to_tp
from shardwise.layout import Layout, Shape
from shardwise.mesh import replica_groups

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def sum_gradient(parameter: Tensor, layout: Layout, shape: Shape, mesh: DeviceMesh) -> Tensor:
    """`parameter`, such that what each backward adds to its gradient is summed over the ranks that hold the same values.

    The *contribution* is summed, not the accumulated `.grad`: that would add earlier micro-batches `size` times. A parameter
    that is kept whole goes through `copy_to_tp`, as does a piece that every rank has (B and C of a state-space mixer). A piece
    that some ranks share (KV heads) is put at its place in a zero tensor of the full length first, so that a sum over all
    ranks is one over the holders.
    Shapes: as `parameter`.
    """
    if not (parameter.requires_grad and torch.is_grad_enabled()):
        return parameter
    cut = layout.cut(shape)
    if cut is None:
        return copy_to_tp(parameter, mesh)
    dim, _ = cut
    rank, parts = mesh.get_local_rank(), []
    for piece in layout.pieces(shape, rank, mesh.size()):
        part = parameter.narrow(dim, piece.local.start, piece.local.stop - piece.local.start)
        if piece.copies == mesh.size():  # the same rows on every rank
            part = copy_to_tp(part, mesh)
        elif piece.copies > 1:
            part = _sum_piece(part, dim, piece.full, shape[dim], mesh)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _sum_piece(part: Tensor, dim: int, full: slice, length: int, mesh: DeviceMesh) -> Tensor:
    sides = (0, 0) * (part.dim() - 1 - dim) + (full.start, length - full.stop)
    return copy_to_tp(pad(part, sides), mesh).narrow(dim, full.start, full.stop - full.start)


def mean_gradient(parameter: Tensor, mesh: DeviceMesh, batches: int) -> Tensor:
    """`parameter` of an expert that computes tokens of several batches, such that its gradient is that of the mean of their
    losses, as data parallelism has it for every other parameter.

    What this rank's backward gives is the sum over the `batches` that the ranks of `mesh` compute; further batches are those
    of the mesh's replicas, over which it is summed. Shapes: as `parameter`.
    """
    if not (parameter.requires_grad and torch.is_grad_enabled()):
        return parameter
    averaged: Tensor = MeanOverBatches.apply(parameter, mesh, batches)
    return averaged


class MeanOverBatches(torch.autograd.Function):
    """Identity; backward: the sum over replicas, divided by the number of batches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, batches: int) -> Tensor:
        ctx.mesh, ctx.batches = mesh, batches
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        groups = [group for group in replica_groups(ctx.mesh) if group.size() > 1]
        batches = ctx.batches
        grad = grad.clone(memory_format=torch.contiguous_format)
        for group in groups:
            dist.all_reduce(grad, group=group)
            batches *= group.size()
        return grad.div_(batches), None, None
