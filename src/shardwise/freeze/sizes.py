"""Other configs of a type: with every size different, so that what is equal by accident in one is not in the other."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from shardwise import tiny
from shardwise.plans.frozen.scope import integer

Make = Callable[[PreTrainedConfig], nn.Module]

_HEADS = re.compile(r"(^|_)n?_?(num_)?(attention_|attn_)?heads?$|^n_head$|^num_heads$")
_KV = re.compile(r"(kv|key_value)_heads?$|^num_kv|_kv_heads$")
_HEAD_DIM = re.compile(r"head_dim|^d_kv$|^d_head$|dim_head$|attention_head_size|head_size")
_INNER = re.compile(r"intermediate|ffn|inner|^dff$|dim_ff|feed_forward_hidden")
_FIXED = re.compile(
    r"_id$|^num_labels|vocab|layers?$|position|chunk_size|^pad|experts_per|top_?k|window|^_|type_|conv|kernel|_period|_offset|max_"
)
SCALES = ((3, 2, (1, 2), (5, 4)), (2, 2, (1, 1), (3, 2)), (2, 2, (1, 2), (5, 4)))
"""By how much to multiply query heads, KV heads, what is as wide as a head, and inner widths."""


def other_sizes(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Copies of `config` with other heads, head widths, and widths; the first that can be built and run will do."""
    for query, kv, width, inner in SCALES:
        yield _scaled(config, query, kv, width, inner)


def _scaled(config: PreTrainedConfig, query: int, kv: int, width: tuple[int, int], inner: tuple[int, int]) -> PreTrainedConfig:
    made = copy.deepcopy(config)
    hidden = getattr(config, "hidden_size", None)
    for name, value in list(vars(config).items()):
        if not integer(value) or value < 2 or _FIXED.search(name):
            continue
        if _KV.search(name):
            setattr(made, name, value * (query if value == getattr(config, "num_attention_heads", None) else kv))
        elif _HEADS.search(name):
            setattr(made, name, value * query)
        elif _HEAD_DIM.search(name):
            setattr(made, name, value * width[0] // width[1])
        elif _INNER.search(name):
            setattr(made, name, value * inner[0] // inner[1])
        elif value == hidden:
            setattr(made, name, value * query * width[0] // width[1])
    return made


def unrelated_sizes(config: PreTrainedConfig, make: Make) -> PreTrainedConfig:
    """`config` with as many of its other integers changed, each by itself, as leave the model with the same parameters."""
    families = _families(config, make)
    changed = copy.deepcopy(config)
    for name, value in list(vars(config).items()):
        known = any(kind.search(name) for kind in (_KV, _HEADS, _HEAD_DIM, _INNER, _FIXED))
        if not integer(value) or value < 8 or known or value == getattr(config, "hidden_size", None):
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


def other_options(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Copies of `config`, each with one flag the other way round, or with another number of KV heads; and what is different."""
    for name, value in sorted(vars(config).items()):
        if isinstance(value, bool) and not name.startswith(("_", "output_", "return_")) and name != "use_cache":
            yield name, _with(config, {name: not value})
    query: Any = getattr(config, "num_attention_heads", None)
    kv: Any = getattr(config, "num_key_value_heads", None)
    if integer(query) and integer(kv) and "num_key_value_heads" in vars(config):
        for number in {query, query // 2, 2} - {kv}:
            yield "heads", _with(config, {"num_key_value_heads": number})


def _with(config: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedConfig:
    made = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def tiny_config(name: str) -> PreTrainedConfig:
    """The config of the tiny model of a type."""
    return tiny.config(tiny.PARTS.get(name, name))
