"""The cache of keys and values that prefix tuning starts with, of which each rank takes its heads'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from shardwise.collectives import copy_to_tp
from shardwise.errors import ShardwiseError
from shardwise.layout import Sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_MARK = "_shardwise_part"


def cut_prefix(cache: Any, layouts: Sequence[tuple[Sharded, int]], mesh: DeviceMesh) -> None:
    """Keep this rank's heads of a prefix that PEFT has put into `cache`, in place; what the model has seen before is its own.

    Args:
        cache: of the call; None for none.
        layouts: as `prefix_layouts` says.
        mesh: the tp axis.

    Each rank's gradient is that of its own heads, of which several ranks may have the same: it is summed. Raises
    `ShardwiseError` for a prefix of other heads than the model's.
    """
    if cache is None or getattr(cache, _MARK, False):
        return
    mark_as_part(cache)
    if not isinstance(cache, DynamicCache) or cache.get_seq_length() == 0:
        return
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    heads = {tensor.shape[1] for tensor in tensors} | {count for _, count in layouts}
    if len(heads) != 1 or len(cache.layers) != len(layouts):
        raise ShardwiseError(
            f"A prefix for {len(cache.layers)} layers, and the model has {len(layouts)}; KV heads: {sorted(heads)}."
        )
    whole = copy_to_tp(torch.stack(tensors), mesh).unbind()
    rank, size = mesh.get_local_rank(), mesh.size()
    for layer, (layout, _), keys, values in zip(cache.layers, layouts, whole[::2], whole[1::2], strict=True):
        layer.keys, layer.values = (_part(layout, tensor, rank, size) for tensor in (keys, values))


def mark_as_part(cache: Any) -> None:
    """Say that `cache` is a model's own, which has this rank's heads."""
    if isinstance(cache, DynamicCache):
        setattr(cache, _MARK, True)


def _part(layout: Sharded, tensor: Tensor, rank: int, size: int) -> Tensor:
    parts = [
        tensor.narrow(1, piece.full.start, piece.full.stop - piece.full.start)
        for piece in layout.pieces(tuple(tensor.shape), rank, size)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
