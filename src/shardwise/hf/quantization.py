"""Whether a config says that its weights are quantized."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig

from shardwise.checkpoint.quantized import METHODS
from shardwise.errors import CheckpointError, describe
from shardwise.hf.configs import config_parts


def quantization(config: PreTrainedConfig) -> tuple[str, dict[str, Any]] | None:
    """How the weights are quantized, says `config` or a part of it: the method, and its settings. None where they are not.

    Raises:
        CheckpointError: by a method that shardwise can't undo.
    """
    for part in config_parts(config):
        found = getattr(part, "quantization_config", None)
        if found is None:
            continue
        settings: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
        method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")) or "by a method not named")
        if method in METHODS:
            return method, settings
        raise CheckpointError(
            describe(
                f"{config.model_type}: a quantized checkpoint can't be sharded.",
                quantized=f"{method}, says the quantization_config of the config",
                can_be=", ".join(sorted(METHODS)) + ": dequantized while they are loaded",
                either=[
                    "use a checkpoint in float32, bfloat16 or float16, or",
                    "load it once with plain transformers, model.dequantize(), and save_pretrained",
                ],
            )
        )
    return None


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that is not quantized; where it doesn't say so, its dtype is bfloat16, as transformers has it then."""
    config = copy.deepcopy(config)
    for part in config_parts(config):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    config.dtype = config.dtype or torch.bfloat16
    return config
