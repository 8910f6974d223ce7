"""What a parallel transformers model does differently itself: it saves collectively, and generates the same tokens on every
rank.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from shardwise.errors import ShardwiseError, describe
from shardwise.generation import same_random_state
from shardwise.layers import ParallelStyle
from shardwise.parallelize import required_state
from shardwise.saving import save_pretrained


class ShardedModel(ParallelStyle):
    """Mixed in front of a transformers model's own class, whose name it keeps."""

    prefix = ""

    @classmethod
    def for_model(cls, model: nn.Module) -> type[ShardedModel] | None:
        """The class to mix in, or None for a module that is no transformers model."""
        return cls if isinstance(model, PreTrainedModel) else None

    @property
    def tp_size(self) -> int:
        """What transformers' Trainer asks before it sets up data parallelism.

        Raises `ShardwiseError`: it would deal different batches to the ranks of one model, clip each by the norm of its own
        shards, and save on one rank only.
        """
        raise ShardwiseError(
            describe(
                "transformers.Trainer cannot train a parallel model yet: it would clip each rank by its own shards' norm.",
                either=[
                    "train in a loop of your own: loss.backward(), shardwise.clip_grad_norm_(model, 1.0), optimizer.step(), or",
                    "shardwise.unparallelize(model) first",
                ],
            )
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `ShardwiseError`: the table says how long the vocabulary is, and each rank holds a part of it."""
        raise ShardwiseError(
            describe(
                "resize_token_embeddings: the vocabulary of a parallel model cannot be resized.",
                either=["resize the ordinary model, save it, and load that, or", "shardwise.unparallelize(model) first"],
            )
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`; the ranks sample with the first rank's random state. Collective.

        Where experts are dealt to several replicas, all ranks go on until the last replica has its tokens (`synced_gpus`): the
        others' experts are needed for each.
        """
        same_random_state(self._tp.mesh)
        state = required_state(self)
        if state.ep.size() > state.mesh.size():
            kwargs.setdefault("synced_gpus", True)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the ordinary checkpoint. Collective: every rank must call it. See `shardwise.saving.save_pretrained`."""
        save_pretrained(self, save_directory, *args, **kwargs)
