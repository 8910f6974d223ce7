"""What happens around the weights: which class a config asks for, and the generation config."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module, resolve_trust_remote_code
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class, add_generation_mixin_to_remote_model

from shardwise.checkpoint.quantized import METHODS
from shardwise.errors import CheckpointError, describe
from shardwise.hf.configs import config_parts


def resolve_model_class(
    auto_class: type[_BaseAutoModelClass] | type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    path_or_id: str | os.PathLike[str] | None = None,
    trust_remote_code: bool | None = None,
    **hub_kwargs: Any,
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The concrete class that `auto_class` makes for `config`, and the config to make it from.

    That config is the text part of a composite one where `auto_class` picks a text-only model. A concrete class is returned
    as it is. As transformers does, this may import a model's own code from `path_or_id` (default: `config.name_or_path`).

    Raises:
        CheckpointError: the config is quantized by a method that shardwise can't undo.
        ValueError: `auto_class` has no model for the config, or the model needs code that `trust_remote_code` doesn't allow.
    """
    quantization(config)
    if issubclass(auto_class, PreTrainedModel):
        return auto_class, config
    mapping = auto_class._model_mapping
    known = _get_model_class(config, mapping) if type(config) in mapping else None
    reference = (getattr(config, "auto_map", None) or {}).get(auto_class.__name__)
    if reference is not None:
        path = str(path_or_id or config.name_or_path)
        upstream = reference.split("--")[0] if "--" in reference else None
        trusted = resolve_trust_remote_code(trust_remote_code, path, known is not None, True, upstream_repo=upstream)
        # a class that the user registered goes before the repository's
        if trusted and (known is None or known.__module__.startswith("transformers.")):
            remote = get_class_from_dynamic_module(reference, path, **hub_kwargs)
            remote.register_for_auto_class(auto_class=auto_class)
            return add_generation_mixin_to_remote_model(remote), config
    if known is None:
        raise ValueError(
            describe(
                f"{auto_class.__name__} has no model of type {config.model_type}.",
                config=type(config).__name__,
                written_by=", ".join(config.architectures or []) or "not said in the config",
                either=["use another auto class, or", "upgrade transformers"],
            )
        )
    text = config.sub_configs.get("text_config")
    is_text_part = text is not None and getattr(known, "config_class", None) == text
    return known, config.get_text_config() if is_text_part else config


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


def attach_generation_config(model: PreTrainedModel, path_or_id: str | os.PathLike[str], **hub_kwargs: Any) -> None:
    """Give a model that can generate the generation config of its checkpoint, which `load_lazily` doesn't see.

    Taken from generation_config.json; where there is none, from config.json (old checkpoints keep it there).
    """
    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(path_or_id, **hub_kwargs)
    except OSError:
        model.generation_config = GenerationConfig.from_pretrained(
            path_or_id, config_file_name="config.json", _from_model_config=True, **hub_kwargs
        )
