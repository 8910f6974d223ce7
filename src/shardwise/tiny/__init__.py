"""Tiny random models, a type each: for tests, and for a first look at how a type is made parallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shardwise.tiny.nested import NESTED, PARTS, TOWER
from shardwise.tiny.sizes import COMMON, TINY
from shardwise.tiny.unplanned import UNPLANNED

__all__ = ["PARTS", "build", "config", "empty", "known", "on_meta", "randomised", "types"]


def types() -> list[str]:
    """Every causal-LM type of transformers, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@cache
def known(name: str) -> frozenset[str]:
    """The fields that a type's config has."""
    names = {field for kind in CONFIG_MAPPING[name].__mro__ for field in getattr(kind, "__annotations__", {})}
    return frozenset(names | _aliases(name).keys())


def config(name: str, **options: object) -> PreTrainedConfig:
    """The config of a type, without dropout: the common sizes, and what `TINY`, `UNPLANNED` or `NESTED` says besides."""
    name = PARTS.get(name, name)
    common = {key: value for key, value in COMMON.items() if key in known(name)}
    sizes: dict[str, object] = {}
    for given in (common, _without_dropout(name), TINY.get(name, {}), UNPLANNED.get(name, {}), _parts(name), options):
        sizes |= {_aliases(name).get(key, key): value for key, value in given.items()}  # a field has several names
    return AutoConfig.for_model(name, **sizes)


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
    """The model of a config, as transformers initialises it: for causal LMs, or of the class that the config names."""
    if type(made) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM.from_config(made, dtype=dtype)
    kind: type[PreTrainedModel] = getattr(transformers, (made.architectures or ["AutoModelForCausalLM"])[0])
    return kind._from_config(made, dtype=dtype)


@cache
def _aliases(name: str) -> Mapping[str, str]:
    return dict(CONFIG_MAPPING[name].attribute_map)


def _without_dropout(name: str) -> dict[str, object]:
    """The rates of dropout in a config that are not 0 by default, as 0."""
    found = ((field, getattr(CONFIG_MAPPING[name], field, None)) for field in known(name) if "drop" in field)
    return {field: 0.0 for field, rate in found if isinstance(rate, float) and rate}


def _parts(name: str) -> dict[str, object]:
    """The configs inside the config of a type, and what else it says."""
    sizes = dict(NESTED.get(name, {}))
    for field, value in sizes.items():
        if isinstance(value, tuple):
            kind, given = value
            tower = {} if field == "text_config" else {k: v for k, v in TOWER.items() if k in known(kind)}
            sizes[field] = config(kind, **{**tower, **given}).to_dict()
    return sizes
