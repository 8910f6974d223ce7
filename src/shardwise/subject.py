"""What a tool runs on: the model that a person names at the command line, as a config, and as a checkpoint in a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from shardwise import tiny
from shardwise.errors import ShardwiseError, describe
from shardwise.hf import build, cut


@dataclass(frozen=True)
class Subject:
    """A model that a tool runs on.

    Attributes:
        name: as it was asked for.
        config: of it, cut to fewer layers where that was asked for.
        path: folder or hub id of its checkpoint; None where its weights are to be made.
    """

    name: str
    config: PreTrainedConfig
    path: str | None

    def make(self, folder: Path, dtype: torch.dtype = torch.float32) -> str:
        """The checkpoint to load: its own, or one with random weights of `dtype`, written to `folder`."""
        if self.path is not None:
            return self.path
        tiny.randomised(lambda: build(self.config, dtype)).save_pretrained(folder)
        return str(folder)


def find(model: str, *, random: bool = False, layers: int | None = None) -> Subject:
    """What `model` names.

    Args:
        model: a directory, a hub id, or, with `random`, a model type.
        random: a type's tiny model, with random weights; of a directory or hub id, its own sizes with random weights.
        layers: keep this many layers only, with random weights.

    Raises:
        ShardwiseError: there is no such model, or a type was named without `random`.
    """
    if _is_type(model):
        if not random:
            raise ShardwiseError(
                describe(
                    f"{model} is a model type, which has no weights.",
                    either=["--random: a tiny model of this type with random weights, or", "a directory or a hub id"],
                )
            )
        config = tiny.config(tiny.PARTS.get(model, model))
    else:
        config = find_config(model)
    if layers is not None:
        config = cut(config, layers)
    return Subject(model, config, None if random or layers is not None else model)


def dtype_named(name: str) -> torch.dtype:
    """torch's dtype of this name. Raises `ShardwiseError` where there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ShardwiseError(describe(f"dtype {name}: there is none of that name.", known="float32, bfloat16, float16"))
    return dtype


def positions(config: PreTrainedConfig, most: int) -> int:
    """`most` tokens, or as many as the model has positions for."""
    return min(most, getattr(config.get_text_config(), "max_position_embeddings", None) or most)


def find_config(model: str) -> PreTrainedConfig:
    """The config of a directory, a model type (its default sizes) or a hub id. Raises `ShardwiseError` where there is none."""
    if _is_type(model):
        return AutoConfig.for_model(model)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        if os.path.isdir(model):
            raise ShardwiseError(
                describe(
                    f"{model}: there is no config.json in the directory that transformers can read.",
                    why=str(error).splitlines()[0],
                    either=["the directory to which save_pretrained wrote the model, or", "a hub id"],
                )
            ) from error
        raise ShardwiseError(
            describe(
                f"{model}: no directory with a config.json, no model type of transformers, and no model that the hub gives.",
                why=str(error).splitlines()[0],
                either=["a path or a hub id that exists, or", f"one of the types: {_types_like(model)}"],
            )
        ) from error


def _is_type(model: str) -> bool:
    return model in CONFIG_MAPPING and not os.path.isdir(model)


def _types_like(name: str) -> str:
    return ", ".join(get_close_matches(name, CONFIG_MAPPING.keys(), n=4, cutoff=0.4) or ["llama", "qwen3", "mixtral"])
