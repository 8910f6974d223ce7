"""The options that change what is cut, or how: found in each type's config by their fields, and switched in two groups.

The options of a group are switched in one run, since none of them takes the place of another: biases, ties, norms and caps
act on their own terms of the sum. What would (dense layers instead of experts, or no pad id instead of another) is in the
other group. The vocabulary has 127 ids in all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from transformers import PreTrainedModel

from parity import types

Changes = dict[str, object]
Fields = Mapping[str, object]
"""The values of the fields of a type's tiny config."""

KV_HEADS = ("num_key_value_heads", "swa_num_key_value_heads")
QUERY_HEADS = ("num_attention_heads", "swa_num_attention_heads")
SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Option:
    """An option of configs.

    Args:
        name: in words.
        changes: what it changes in a config with these fields; nothing where there is no such option.
        particular: what it is in types that call it otherwise, or need more than one field for it.
    """

    name: str
    changes: Callable[[Fields], Changes] = lambda fields: {}
    particular: Mapping[str, Changes] = field(default_factory=dict)

    def of(self, name: str) -> Changes:
        """What it changes in the tiny config of a type."""
        return dict(self.particular[name]) if name in self.particular else self.changes(types.fields(name))


def flipped(*names: str, containing: str = "") -> Callable[[Fields], Changes]:
    """On where the type has it off by default, off where it has it on: `names`, and what has `containing` in its name."""
    return lambda fields: {
        name: not value
        for name, value in fields.items()
        if isinstance(value, bool) and (name in names or (containing and containing in name))
    }


def given(value: object, *names: str, instead: object = ...) -> Callable[[Fields], Changes]:
    """`value` for each of `names`, where it is `instead` (by default anything else) now."""
    return lambda fields: {
        name: value for name in names if name in fields and instead in (..., fields[name]) and fields[name] != value
    }


def three_kv_heads(fields: Fields) -> Changes:
    """For six query heads of 16 features."""
    heads = given(3, *KV_HEADS, instead=2)(fields)
    wider = given(6, *QUERY_HEADS)(fields) | given(96, "hidden_size")(fields) | given(12, "mamba_n_heads")(fields)
    wider |= given(192, "mamba_d_ssm")(fields) | given(96, "lru_width")(fields)
    return heads | wider if heads else {}


def capped(fields: Fields) -> Changes:
    """On logits: of attention, of the vocabulary, of the router."""
    return {name: None if value else 1.5 for name, value in fields.items() if name.endswith("logit_softcapping")}


def mixed_attention(fields: Fields) -> Changes:
    """Sliding and full attention in turns, the other way round where the type has that by default."""
    kinds = fields.get("layer_types")
    if "use_sliding_window" in fields:
        return {"use_sliding_window": True, "sliding_window": 8, "layer_types": SLIDING_THEN_FULL}
    return {"layer_types": kinds[::-1]} if isinstance(kinds, list) and "sliding_attention" in kinds else {}


def more_shared_experts(fields: Fields) -> Changes:
    """One more than the type has by default."""
    more: Changes = {name: value + 1 for name in SHARED_EXPERTS if isinstance(value := fields.get(name), int)}
    return more | given(48, "shared_intermediate_size", instead=0)(fields)


def balanced(fields: Fields) -> Changes:
    """With a loss of the routers that is not small beside the other."""
    return dict(BALANCED) if BALANCED.keys() <= fields.keys() else {}


def mlps(kind: str, dense: int) -> Callable[[Fields], Changes]:
    """All of one kind, "dense" or "sparse": `dense` of the two layers are dense."""

    def changes(fields: Fields) -> Changes:
        kinds = fields.get("mlp_layer_types")
        found = given(dense, "first_k_dense_replace", "num_dense_layers")(fields)
        found |= given(list(range(dense)), "mlp_only_layers")(fields)
        return found | ({"mlp_layer_types": [kind, kind]} if isinstance(kinds, list) and kind in kinds else {})

    return changes


BALANCED: Changes = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
GEMMA_MOE: Changes = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
SHARED_KV: Changes = {"num_hidden_layers": 4, "layer_types": SLIDING_THEN_FULL * 2, "num_kv_shared_layers": 2}
OTHER_CAP: Changes = {"final_logit_softcapping": 1.5}  # these take no None
SLIDING_ALONE: Changes = {"use_sliding_window": True, "sliding_window": 8}
COMPRESSED = ("axk1", "axk2", "deepseek_v32", "deepseek_v4", "dots3_note_text", "glm_moe_dsa", "hy_v4", "longcat_flash")
"""Whose configs refuse queries without a latent."""

ONE_KV_HEAD = (
    Option(
        "one KV head",
        given(1, *KV_HEADS, instead=2),
        {
            "dbrx": {"attn_config": {"kv_n_heads": 1, "clip_qkv": 0.2, "rope_theta": 10000.0}},
            "falcon": {"num_kv_heads": 1},
            "gemma4_text": {"num_key_value_heads": 1, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        },
    ),
    Option("biases", flipped(containing="bias")),
    Option("ties", flipped("tie_word_embeddings"), {"dbrx": {}}),  # its config refuses them
    Option("q and k norms", flipped("use_qk_norm", "qk_layernorm")),
    Option("pad id of the last row", given(126, "pad_token_id"), {"xglm": {}}),  # which has fewer positions
    Option("soft-caps", capped, {"gemma3n_text": OTHER_CAP, "inkling2_text": OTHER_CAP}),
    Option("parallel residual", flipped("use_parallel_residual")),
    Option("sparse layers", mlps("sparse", 0), {"gemma4_text": GEMMA_MOE}),
    Option("shared experts", more_shared_experts),
    Option("load-balancing loss", balanced),
    Option("routing weights", flipped("norm_topk_prob"), {"doge": {}}),  # which divides in place and has no gradient then
)
THREE_KV_HEADS = (
    Option("three KV heads", three_kv_heads, {"diffllama": {}}),  # pairs of KV heads
    Option("no pad id", given(None, "pad_token_id"), {"emu3": {}}),  # whose config refuses it
    Option("clipped q, k and v", given(0.2, "clip_qkv")),
    Option("dense layers", mlps("dense", 2), {"doge": {"is_moe": False}, "granitemoehybrid": {"num_local_experts": 0}}),
    Option("whole queries", given(None, "q_lora_rank"), {name: {} for name in COMPRESSED}),
    Option("sliding and full attention", mixed_attention, {"qwen3_moe": SLIDING_ALONE, "recurrent_gemma": {}}),
    Option(
        "shared KV layers",
        particular={
            "gemma3n_text": SHARED_KV | {"intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.95, 0.0] * 2},
            "gemma4_text": SHARED_KV | {"use_double_wide_mlp": True},
            "gemma4_unified_text": SHARED_KV | {"use_double_wide_mlp": True},
        },
    ),
    Option("experts of a latent", given(24, "moe_latent_size")),
    Option("gate of attention", flipped("gating")),
)
GROUPS = {"one KV head": ONE_KV_HEAD, "three KV heads": THREE_KV_HEADS}


@cache
def switched(group: str, name: str) -> Mapping[str, Changes]:
    """The options of a group that a type has, and what they change: those that do nothing to its model are left out."""
    found = {option.name: option.of(name) for option in GROUPS[group]}
    return {option: changes for option, changes in found.items() if changes and _matters(name, changes)}


def build(group: str, name: str) -> PreTrainedModel:
    """The tiny model of a type with all its options of a group."""
    together: Changes = {}
    for changes in switched(group, name).values():
        together |= changes
    return types.build(name, **together)


def _matters(name: str, changes: Changes) -> bool:
    """Whether another model comes out: other modules, names, shapes or ties, other logits, or another loss."""
    if _structure(name, {}) != _structure(name, changes):
        return True
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        first, second = (types.build(name, **options).eval()(input_ids=ids, labels=ids) for options in ({}, changes))
    return not (torch.equal(first.logits, second.logits) and torch.equal(first.loss, second.loss))


def _structure(name: str, options: Changes) -> tuple[str, list[tuple[str, str]]]:
    model: PreTrainedModel = types.on_meta(name, **options)
    first: dict[int, str] = {}
    ties = [(key, first.setdefault(id(p), key)) for key, p in model.named_parameters(remove_duplicate=False)]
    return repr(model) + str([tuple(p.shape) for p in model.parameters()]), ties
