"""Tiny random models, a type each: for tests, and for a first look at how a type is made parallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Emu3ForCausalLM,
    Emu3TextConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from shardwise.tiny.sizes import COMMON, TINY

PARTS: Mapping[str, str] = MappingProxyType({"emu3": "emu3_text_model"})
"""Of types whose causal-LM class is that of a part: the part."""


@cache
def known(name: str) -> frozenset[str]:
    """The fields that a type's config has."""
    config = type(AutoConfig.for_model(name))
    names = {field for kind in config.__mro__ for field in getattr(kind, "__annotations__", {})}
    return frozenset(names | set(getattr(config, "attribute_map", {})))


def config(name: str, **options: object) -> PreTrainedConfig:
    """The config of a type in `TINY`, or of another one, for which the common sizes may do."""
    common = {key: value for key, value in COMMON.items() if key in known(name)}
    return AutoConfig.for_model(name, **common | TINY.get(name, {}) | options)


def build(name: str, **options: object) -> PreTrainedModel:
    """The model in float32, without dropout, every parameter random: the same in every process."""
    made = config(name, **options)
    return randomised(lambda: empty(made, torch.float32))


def randomised(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """What `make` gives, without dropout, every parameter random: the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.copy_(parameter.nan_to_num(0).clamp(-3, 3) + torch.randn_like(parameter) * 0.05)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def on_meta(name: str, **options: object) -> PreTrainedModel:
    """The model without memory."""
    with torch.device("meta"):
        return empty(config(name, **options))


def empty(made: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a config, as transformers initialises it."""
    if type(made) is Emu3TextConfig:  # the Auto class knows the config around it alone
        return Emu3ForCausalLM._from_config(made, dtype=dtype)
    return AutoModelForCausalLM.from_config(made, dtype=dtype)
