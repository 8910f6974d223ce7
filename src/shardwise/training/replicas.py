"""Data parallelism around a tensor-parallel model: the replicas start alike, and step by the mean of their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.mesh import replica_groups
from shardwise.model_state import parallel_parts, row_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_BUCKET_BYTES = 25 * 2**20  # as torch's DDP: large enough for the link, small beside the model


def average_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Replace each gradient by its mean over the replicas of `mesh`, the tp axis. Collective; where there is one, nothing.

    A parameter without gradient in some replicas counts as zero there; without one in any, it stays without. Experts dealt to
    several replicas are left alone: their gradients are means already.
    """
    for group in _groups(mesh):
        shared = [p for p in _shared(model) if p.requires_grad]
        device = shared[0].device if shared else torch.device("cpu")
        has = torch.tensor([p.grad is not None for p in shared], dtype=torch.int32, device=device)
        dist.all_reduce(has, group=group)
        for parameter, count in zip(shared, has.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in shared if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat, group=group)
            flat.div_(group.size())
            for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))


def copy_first_replica(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give every replica of `mesh` the parameters and buffers of the first one. Collective."""
    for group in _groups(mesh):
        for tensor in (*_shared(model), *model.buffers()):
            with torch.no_grad():
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, group=group, group_src=0)
                tensor.copy_(whole)


def _groups(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    return [group for group in replica_groups(mesh) if group.size() > 1]


def _shared(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that every replica has alike, in an order that all ranks have."""
    elsewhere = set()
    for state, part in parallel_parts(model):
        if state.ep.size() > state.mesh.size():
            named = part.named_parameters()
            elsewhere |= {p for name, p in named if (row := row_of(state, name, p)).axis == "ep" and row.sharded}
    return [p for p in model.parameters() if p not in elsewhere]


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype that travel together."""
    bucket: list[Tensor] = []
    for gradient in sorted(gradients, key=lambda g: str(g.dtype)):
        full = sum(g.nbytes for g in bucket) + gradient.nbytes > _BUCKET_BYTES
        if bucket and (full or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
