"""A model inside of a parallel one: the base of a causal LM, the text model of one that reads images."""

from __future__ import annotations

from typing import Any

from torch import nn

from shardwise.errors import ShardwiseError, describe
from shardwise.layers.base import ParallelStyle


class PartOfModel(ParallelStyle):
    """Mixed in front of its class, whose name it keeps: it computes as ever, and is not saved alone."""

    prefix = ""

    def extra_repr(self) -> str:
        return nn.Module.extra_repr(self)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Raises `ShardwiseError`: each rank would write its shards, all into the same files."""
        name = type(self).__name__
        raise ShardwiseError(
            describe(
                f"{name} is a part of a parallel model, and cannot be saved alone.",
                either=[
                    f"save the whole model: {name}.from_pretrained reads its part of that checkpoint, or",
                    "shardwise.unparallelize(model) first",
                ],
            )
        )
