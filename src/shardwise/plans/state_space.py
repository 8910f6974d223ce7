"""Models of state-space mixers that have no plan of their own: Mamba and Mamba-2 alone, or beside attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from shardwise.heads import heads_of
from shardwise.plan import wildcard
from shardwise.plans.mixers import mamba, mamba2, multi_head_mamba
from shardwise.plans.parts import attention, mlp, packed_mlp, places, rule
from shardwise.spec import Rule

_MIXERS = ("layers.*.mamba", "layers.*.mamba_decoder.mamba")
_BEHIND = "behind a layer that several places share"
_LOW_RANK = "the low rank of an adapter, too small to cut it"


def mamba_alone(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Mamba and Falcon Mamba: a mixer a layer."""
    return mamba(model, prefix, "layers.*.mixer", size)


def mamba2_alone(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Mamba-2: a mixer a layer."""
    return mamba2(model, prefix, "layers.*.mixer", size)


def zamba(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Zamba: multi-head Mamba mixers, and in front of some of them a decoder layer that they share."""
    shared = "layers.*.shared_transf"
    return [
        *(found for path in _MIXERS for found in multi_head_mamba(model, prefix, path, size)),
        *attention(model, prefix, f"{shared}.self_attn"),
        *mlp(prefix, f"{shared}.feed_forward"),
        rule(f"{prefix}layers.*.linear", "colwise_gather_output", _BEHIND),
    ]


def zamba2(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Zamba2: Mamba-2 mixers, and in front of some of them shared decoder layers, with adapters of each place's own."""
    shared = "layers.*.shared_transformer"
    adapters = f"{prefix}{shared}.feed_forward.gate_up_proj_adapter_list.*"
    return [
        *(found for path in _MIXERS for found in mamba2(model, prefix, path, size)),
        *attention(model, prefix, f"{shared}.self_attn"),
        *_attention_adapters(model, prefix, f"{shared}.self_attn", size),
        *packed_mlp(prefix, f"{shared}.feed_forward"),
        rule(f"{adapters}.0", "replicate", _LOW_RANK),
        rule(f"{adapters}.1", "packed_colwise", "gate | up, as in the layer that it is added to"),
        rule(f"{prefix}layers.*.linear", "colwise_gather_output", _BEHIND),
    ]


def _attention_adapters(model: nn.Module, prefix: str, path: str, size: int) -> list[Rule]:
    """Adapters that are added to the queries, keys and values: cut as these are."""
    heads = next((heads_of(module) for name, module in model.named_modules() if wildcard(name) == path), None)
    if heads is None or not places(model, path, having="linear_q_adapter_list"):
        return []
    found: list[Rule] = []
    config: Any = model.config
    width = config.attention_hidden_size
    for letter in ("q", "k", "v"):
        cut = heads.query_cut(width, size) if letter == "q" else heads.kv_cut(width, size)
        adapters = f"{prefix}{path}.linear_{letter}_adapter_list.*"
        found.append(rule(f"{adapters}.0", "replicate", _LOW_RANK))
        found.append(replace(rule(f"{adapters}.1", "colwise", "as the heads that it is added to"), cut=cut))
    return found
