"""What happens around the weights: which class a config asks for, and the generation config."""

from __future__ import annotations

import os
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module, resolve_trust_remote_code
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class, add_generation_mixin_to_remote_model

from shardwise.errors import describe
from shardwise.hf.quantization import quantization


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
