"""Adapters through transformers' own methods: loading and saving; and whether a model's adapters are those seen last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file, is_peft_available

from shardwise.errors import CheckpointError, ShardwiseError, describe
from shardwise.model_state import required_state
from shardwise.replicas import together


class AdaptersSeen:
    """The adapters in a model, as cheaply compared as can be, because it is done at every forward.

    Args:
        model: with PEFT's layers in it.
        configs: of its adapters, by name.
    """

    def __init__(self, model: nn.Module, configs: Mapping[str, Any]) -> None:
        self._configs = dict(configs)
        self._parts = {name: _first_part(model, name) for name in configs}

    def holds(self, configs: Mapping[str, Any]) -> bool:
        """Whether `configs` are the same objects still, and each adapter lies where it did."""
        if len(configs) != len(self._configs):
            return False
        for name, config in configs.items():
            if self._configs.get(name) is not config:
                return False
            holder, part = self._parts[name]
            if holder is not None and holder._modules.get(name) is not part:
                return False
        return True


def _first_part(model: nn.Module, adapter: str) -> tuple[nn.Module | None, nn.Module | None]:
    # Every LoRA layer has a dropout for each of its adapters (which may do nothing).
    found = (getattr(module, "lora_dropout", None) for module in model.modules())
    holder = next((m for m in found if isinstance(m, nn.ModuleDict) and adapter in m), None)
    return holder, None if holder is None else holder[adapter]


def load_adapter(
    model: PreTrainedModel,
    peft_model_id: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    *,
    is_trainable: bool = False,
    peft_config: Any = None,
    adapter_state_dict: dict[str, Tensor] | None = None,
    **keywords: Any,
) -> Any:
    """As transformers' `load_adapter`, through PEFT: put an adapter into a parallel model and load its full tensors.

    Args:
        model: a parallel model.
        peft_model_id: a directory or hub id with the adapter, unless `peft_config` and `adapter_state_dict` are given.
        adapter_name: by default "default".
        is_trainable: whether its parameters get gradients.
        peft_config: its config, where it is not read.
        adapter_state_dict: its tensors by their names on disk, where they are not read.
        keywords: of `huggingface_hub`, such as `revision`; others are refused.

    Returns the names that were missing or not expected, as `load_state_dict` does. Raises `ShardwiseError` for an adapter that
    would be wrong on a parallel model, and for keywords that it does not have; `MismatchError` where another rank can't read
    it.
    """
    from peft import PeftConfig, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict

    name = adapter_name or "default"
    _refuse_keywords(keywords)
    if getattr(model, "_hf_peft_config_loaded", False) and name in model.peft_config:
        raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
    path = os.fspath(peft_model_id or "")

    def read() -> tuple[Any, dict[str, Tensor]]:
        config = peft_config or PeftConfig.from_pretrained(path, **keywords)
        return config, load_peft_weights(path, device="cpu", **keywords) if adapter_state_dict is None else adapter_state_dict

    config, weights = together(required_state(model).ep, "load_adapter", read)
    config.inference_mode = not is_trainable
    inject_adapter_in_model(config, model, name)
    model._hf_peft_config_loaded = True
    outcome = set_peft_model_state_dict(model, weights, adapter_name=name)
    if not is_trainable:
        model.eval()
    model.set_adapter(name)
    for parameter in _adapter_parameters(model, name):
        parameter.requires_grad_(is_trainable)
    return outcome


def _adapter_parameters(model: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name or name.endswith(f".{adapter}"):
            yield parameter


def _refuse_keywords(keywords: Mapping[str, Any]) -> None:
    known = {"revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download", "proxies"}
    for name, value in keywords.items():
        if name not in known and value not in (None, False, "auto"):
            raise ShardwiseError(
                describe(
                    f"load_adapter({name}=...) is not possible for a parallel model.",
                    either=["leave it out, or", "peft.PeftModel.from_pretrained(model, path)"],
                )
            )


def save_adapter(model: PreTrainedModel, directory: str | os.PathLike[str], *args: object, **keywords: object) -> None:
    """Write the active adapter of a parallel model, as transformers' `save_pretrained` of a model with adapters does.
    Collective; the first process writes.
    """
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
    from safetensors.torch import save_file

    if not getattr(model, "_hf_peft_config_loaded", False):
        raise ShardwiseError(
            describe(
                "save_pretrained: the model has adapters that peft.get_peft_model has put into it.",
                either=[
                    "peft_model.save_pretrained(directory), on every rank, for the adapters, or",
                    "peft_model.merge_and_unload().save_pretrained(directory) for the whole model",
                ],
            )
        )
    names = model.active_adapters()
    if len(names) != 1:
        raise ShardwiseError(f"save_pretrained: the active adapters are {names}; model.set_adapter(name) of one of them first.")
    tensors = get_peft_model_state_dict(model, adapter_name=names[0])

    def write() -> None:
        if torch.distributed.get_rank() == 0:
            os.makedirs(directory, exist_ok=True)
            named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
            save_file(named, os.path.join(directory, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
            model.peft_config[names[0]].save_pretrained(os.fspath(directory))

    together(None, "save_pretrained", write)


def adapter_and_base(path: str, **hub_kwargs: Any) -> tuple[str | None, str]:
    """Where an adapter lies, and the model that it was made for, as its config says; of a directory or hub id without one,
    None and `path`. Without PEFT nothing is an adapter, as in transformers.
    """
    config = find_adapter_config_file(path, **hub_kwargs) if is_peft_available() else None
    if config is None:
        return None, path
    try:
        base = json.loads(Path(config).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            describe(
                f"{path}: its adapter_config.json does not say which model the adapter is for.",
                found=repr(error),
                either=["load that model, and model.load_adapter(path), or", "save the adapter again"],
            )
        ) from error
    if not isinstance(base, str):
        raise CheckpointError(f"{path}: its adapter_config.json says {base!r} for base_model_name_or_path.")
    return path, base
