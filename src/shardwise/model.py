"""What a parallel transformers model does differently itself: it saves collectively, and generates the same tokens on every
rank.
"""

from __future__ import annotations

import os
from functools import wraps
from inspect import signature
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shardwise.adapted import TakesAdapters
from shardwise.errors import ShardwiseError, describe
from shardwise.gathering import cut_full_tensors, gather_adapters
from shardwise.hf import (
    GeneratesTogether,
    attentions_are_asked_for,
    cut_prefix,
    gather_attentions,
    mark_as_part,
    save_adapter,
    streamed_together,
)
from shardwise.model_state import replicated, required_state
from shardwise.parallelize import let_weight_be_read
from shardwise.random_state import same_random_state
from shardwise.replicas import refuse_data_parallel
from shardwise.saving import save_pretrained


class ShardedModel(GeneratesTogether, TakesAdapters):
    """Mixed in front of a transformers model's own class, whose name it keeps."""

    prefix = ""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        own: Any = super().forward
        names = list(signature(own).parameters)[1:]

        @wraps(own)  # transformers reads the signature
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                state = required_state(self)
                refuse_data_parallel(self, state.mesh)
                if state.lockstep.is_due(self.training, state.mesh):
                    given = dict(zip(names, args, strict=False)) | kwargs
                    state.lockstep.compare(self, state.mesh, given, replicated(self, state))
            if (prefixes := self.__dict__.get("_prefixes")) is None:
                return call(self, *args, **kwargs)
            cut_prefix(kwargs.get("past_key_values"), prefixes, self._tp.mesh)
            output = call(self, *args, **kwargs)
            mark_as_part(getattr(output, "past_key_values", None))
            return output

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not attentions_are_asked_for(self.config, kwargs):
                return own(self, *args, **kwargs)
            as_tuple = kwargs.get("return_dict") is False
            output = own(self, *args, **(kwargs | {"return_dict": True} if as_tuple else kwargs))
            gather_attentions(output, self.config, self._tp.mesh)
            return output.to_tuple() if as_tuple else output

        cls.forward = forward

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":  # whoever puts one of his own there (TRL, Liger) multiplies by the head's weight himself
            let_weight_be_read(self.get_output_embeddings())  # type: ignore[operator]
        super().__setattr__(name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """This rank's shards by name. Where the model has adapters these, and the embeddings, come full, as PEFT saves them,
        which is collective; with `keep_vars=True` everything is this rank's own.
        """
        named = super().state_dict(*args, **kwargs)
        if "peft_config" in self.__dict__ and not kwargs.get("keep_vars"):
            gather_adapters(self, named, kwargs.get("prefix", ""))
        return named

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        cut_full_tensors(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def for_model(cls, model: nn.Module) -> type[ShardedModel] | None:
        """The class to mix in, or None for a module that is no transformers model."""
        return cls if isinstance(model, PreTrainedModel) else None

    @property
    def tp_size(self) -> None:
        """What transformers' Trainer asks before it sets up data parallelism.

        Raises `ShardwiseError` for every Trainer but ours: it would deal different batches to the ranks of one model, clip each
        by the norm of its own shards, and save on one rank only.
        """
        if "_trainer" in self.__dict__:
            return
        raise ShardwiseError(
            describe(
                "transformers.Trainer cannot train a parallel model: it would clip each rank by its own shards' norm.",
                either=[
                    "shardwise.Trainer, which takes the same arguments (class My(shardwise.TrainerMixin, SFTTrainer) for"
                    " subclasses of transformers' Trainer), or",
                    "a loop of your own: loss.backward(), shardwise.clip_grad_norm_(model, 1.0), optimizer.step()",
                ],
            )
        )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many the whole model has, as transformers counts them."""
        state = required_state(self)
        embeddings = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Embedding)}
        total = 0
        for name, parameter in self.named_parameters():
            if (exclude_embeddings and name in embeddings) or (only_trainable and not parameter.requires_grad):
                continue
            row = state.row(name)
            total += parameter.numel() if row is None else prod(row.shape)
        return total

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """The embeddings, where they have as many rows as asked for, or none were. Otherwise raises `ShardwiseError`: the table
        says how long the vocabulary is, and each rank holds a part of it.
        """
        embeddings: Any = self.get_input_embeddings()  # type: ignore[operator]
        if not (args or kwargs) and new_num_tokens in (None, embeddings.num_embeddings):
            return embeddings
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
        kwargs = streamed_together(state.mesh, kwargs)
        generated = super().generate(*args, **kwargs)  # type: ignore[misc]
        gather_attentions(generated, self.config, state.mesh)  # of the encoder, which it calls itself
        return generated

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `ShardwiseError`: transformers makes the paged cache for all heads, each rank schedules requests by itself,
        and what fails in its thread is logged, and answered by no tokens. `generate_batch` comes here too.
        """
        raise ShardwiseError(
            describe(
                "Continuous batching (generate_batch, paged caches) of a parallel model is not possible.",
                either=[
                    "model.generate(...) with a padded batch, or",
                    "shardwise.unparallelize(model) first",
                ],
            )
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the ordinary checkpoint, or, of a model with adapters of `add_adapter` or `load_adapter`, the adapter, as
        transformers does. Collective: every rank must call it. See `shardwise.saving.save_pretrained`.
        """
        if "peft_config" in self.__dict__:
            save_adapter(self, save_directory, *args, **kwargs)
        else:
            save_pretrained(self, save_directory, *args, **kwargs)
