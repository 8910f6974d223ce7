"""Weights that are read whole: what PEFT makes of a layer's weight when it starts an adapter must be what one process makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

from shardwise.layers.base import ParallelStyle
from shardwise.layout import Layout, Shape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class WholeWeight(ParallelStyle):
    """In front of a parallel layer while an adapter is made: its weight is gathered where it is read, and has no gradient.

    Reading is a collective then; the parameter itself stays the rank's. The layer is not to be called.
    """

    prefix = "Whole"

    @property
    def weight(self) -> Tensor:
        """All of it."""
        own = self._parameters["weight"]
        assert own is not None
        if own.is_meta:
            return own
        layout, shape = self._tp.layouts["weight"]
        return nn.Parameter(gather_whole(own.detach(), layout, shape, self._tp.mesh), requires_grad=False)


def gather_whole(local: Tensor, layout: Layout, shape: Shape, mesh: DeviceMesh) -> Tensor:
    """The full tensor of `shape`, on every rank, from each rank's `local`. Collective. Dtype and device of `local`."""
    rank, size = mesh.get_local_rank(), mesh.size()
    shards = []
    for source in range(size):
        shard = local.contiguous() if source == rank else local.new_empty(layout.local_shape(shape, source, size))
        dist.broadcast(shard, group=mesh.get_group(), group_src=source)
        shards.append(shard)
    full: Tensor = layout.unshard(shards, shape)
    return full
