"""Other configs of a type: with every size different, so that what is equal by accident in one is not in the other."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from shardwise import tiny
from shardwise.plans.frozen.scope import field, integer

SIZE = 2
"""Ranks on which plans are made to be frozen."""

Make = Callable[[PreTrainedConfig], nn.Module]
Change = Callable[[PreTrainedConfig], PreTrainedConfig]
"""A config like another one."""

_HEADS = re.compile(r"(^|_)n?_?(num_)?(attention_|attn_)?heads?$|^n_head$|^num_heads$")
_KV = re.compile(r"(kv|key_value)_(n_)?heads?$|^num_kv|_kv_heads$")
_HEAD_DIM = re.compile(r"head_?dim|^d_kv$|(^|_)d_head$|dim_head$|attention_head_size|head_size")
_INNER = re.compile(r"intermediate|ffn|inner|^dff$|dim_ff|feed_forward_hidden")
_FIXED = re.compile(
    r"_id$|^num_labels|vocab|layers?$|position|chunk_size|^pad|experts_per|top_?k|window|^_|type_|conv|kernel|_period|_offset|max_"
)
_UNCHANGED = re.compile(_KV.pattern + r"|_id$|^num_labels|vocab|layers?$|position|^pad|^_|max_")
_QUERY = ("num_attention_heads", "n_heads", "n_head")
_WIDTH = ("hidden_size", "d_model", "n_embd")
SCALES = ((3, 2, (1, 2), (5, 4)), (2, 2, (1, 1), (3, 2)), (2, 2, (1, 2), (5, 4)))
"""By how much to multiply query heads, KV heads, what is as wide as a head, and inner widths."""


def other_sizes(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Copies of `config` with other heads, head widths, and widths; the first that can be built and run will do."""
    for query, kv, width, inner in SCALES:
        yield _scaled(config, query, kv, width, inner)


def _scaled(config: PreTrainedConfig, *by: Any) -> PreTrainedConfig:
    made = copy.deepcopy(config)
    for name, value in _scaled_fields(vars(config), *by):
        setattr(made, name, value)
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig):
            setattr(made, name, _scaled(part, *by))
    if layers := config.to_diff_dict().get("per_layer_config"):
        made.per_layer_config = {layer: {**given, **dict(_scaled_fields(given, *by))} for layer, given in layers.items()}
    return made


def _scaled_fields(
    fields: Mapping[str, Any], query: int, kv: int, width: tuple[int, int], inner: tuple[int, int]
) -> Iterator[tuple[str, Any]]:
    heads, hidden = (next((fields[name] for name in names if name in fields), None) for names in (_QUERY, _WIDTH))
    for name, value in fields.items():
        if isinstance(value, list) and _HEADS.search(name.removesuffix("_per_layer")) and all(map(integer, value)):
            yield name, [each * query for each in value]
        if not integer(value) or value < 2 or _FIXED.search(name):
            continue
        if _KV.search(name):
            yield name, value * (query if value == heads else kv)
        elif _HEADS.search(name) and not _HEAD_DIM.search(name):
            yield name, value * query
        elif _HEAD_DIM.search(name):
            yield name, value * width[0] // width[1]
        elif _INNER.search(name):
            yield name, value * inner[0] // inner[1]
        elif value == hidden or (name.endswith("hidden_size") and hidden and value % hidden == 0):
            yield name, value * query * width[0] // width[1]


def unrelated_sizes(config: PreTrainedConfig, make: Make) -> PreTrainedConfig:
    """`config` with as many of its other integers changed, each by itself, as leave the model with the same parameters."""
    families = _families(config, make)
    changed = copy.deepcopy(config)
    for name, value in list(vars(config).items()):
        known = any(kind.search(name) for kind in (_KV, _HEADS, _HEAD_DIM, _INNER, _FIXED))
        if not integer(value) or value < 8 or known or value == field(config, "hidden_size"):
            continue
        trial = copy.deepcopy(changed)
        setattr(trial, name, value + 8)
        if _families(trial, make) == families:
            changed = trial
    return changed


def _families(config: PreTrainedConfig, make: Make) -> set[str] | None:
    try:
        with torch.device("meta"):
            return {name for name, _ in make(config).named_parameters()}
    except Exception:  # whatever a model's code says to sizes that it is not made for
        return None


def other_options(config: PreTrainedConfig) -> Iterator[tuple[str, Change]]:
    """What makes of a config one with a flag the other way round, or with another number of KV heads; and what is different."""
    for name, value in sorted(vars(config).items()):
        if isinstance(value, bool) and not name.startswith(("_", "output_", "return_")) and name != "use_cache":
            yield name, partial(with_fields, fields={name: not value})
    query, kv = field(config, "num_attention_heads"), field(config, "num_key_value_heads")
    if integer(query) and integer(kv) and "num_key_value_heads" in vars(config):
        numbers = {query: _a_head_each, query // 2: _half_as_many, 2: _two}
        yield from (("heads", change) for number, change in sorted(numbers.items()) if number != kv)


def _a_head_each(config: PreTrainedConfig) -> PreTrainedConfig:
    return with_fields(config, {"num_key_value_heads": config.num_attention_heads})


def _half_as_many(config: PreTrainedConfig) -> PreTrainedConfig:
    return with_fields(config, {"num_key_value_heads": config.num_attention_heads // 2})


def _two(config: PreTrainedConfig) -> PreTrainedConfig:
    return with_fields(config, {"num_key_value_heads": 2})


def other_numbers(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Copies of `config`, each with one of its numbers twice as large, or one of a config in it."""
    for name, value in sorted(vars(config).items()):
        if integer(value) and value > 1 and not _UNCHANGED.search(name):
            yield with_fields(config, {name: 2 * value})
        elif isinstance(value, PreTrainedConfig):
            yield from (with_fields(config, {name: part}) for part in other_numbers(value))


def with_fields(config: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of `config` with these."""
    made = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def tiny_config(name: str) -> PreTrainedConfig:
    """The config of the tiny model of a type."""
    return tiny.config(tiny.PARTS.get(name, name))


def models(config: PreTrainedConfig) -> list[nn.Module]:
    """The causal LM of a config on meta, and its base model where that is more."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        made: list[nn.Module] = [tiny.empty(copy.deepcopy(config), torch.float32)]  # decoders alone change their config
        if type(config) in AutoModel._model_mapping and config.is_encoder_decoder:
            made.append(AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32))
    return made
