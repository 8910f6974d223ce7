"""Every causal-LM type of transformers that has a plan, as a tiny model and at its default sizes."""

from __future__ import annotations

from functools import cache

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tiny
from tiny import DELTA_NET, DENSE_THEN_SPARSE, LATENT

SLIDING_THEN_FULL: dict[str, object] = {"layer_types": ["sliding_attention", "full_attention"]}
INDEXER: dict[str, object] = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
GATED_DELTA_NET: dict[str, object] = DELTA_NET | {"layer_types": ["linear_attention", "full_attention"]}
LLAMA4: dict[str, object] = {
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
    "num_experts_per_tok": 1,
    "layer_types": ["chunked_attention", "full_attention"],
}
MROPE: dict[str, object] = {
    name: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    for name in ("sliding_attention", "full_attention")
}

# What a type needs besides `tiny.COMMON`; those of `tiny.TINY` are there.
OPTIONS: dict[str, dict[str, object]] = {
    "axk2": LATENT | DENSE_THEN_SPARSE | INDEXER | {"layer_types": ["indexed_attention"] * 2, "n_group": None},
    "beam": DENSE_THEN_SPARSE | {"n_group": 2, "topk_group": 1},
    "cohere2": SLIDING_THEN_FULL,
    "cohere2_moe": SLIDING_THEN_FULL,
    "cohere_compass_text": SLIDING_THEN_FULL | {"rope_parameters": MROPE},
    "deepseek_v2": LATENT | {"n_group": 2, "topk_group": 1},
    "deepseek_v32": LATENT | INDEXER | {"n_group": 2, "topk_group": 1},
    "dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "dots3_note_text": {"swa_num_attention_heads": 8, "swa_num_key_value_heads": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone4": SLIDING_THEN_FULL,
    "gemma3_text": SLIDING_THEN_FULL,
    "gemma4_unified_text": SLIDING_THEN_FULL | {"global_head_dim": 32},
    "glm_moe_dsa": LATENT | DENSE_THEN_SPARSE | INDEXER | {"n_group": 2, "topk_group": 1},
    "granite_swa": SLIDING_THEN_FULL,
    "granitemoe_swa": SLIDING_THEN_FULL,
    "hy_v4": DENSE_THEN_SPARSE | INDEXER,
    "kolibri1": DENSE_THEN_SPARSE | SLIDING_THEN_FULL,
    "laguna": DENSE_THEN_SPARSE | SLIDING_THEN_FULL,
    "llama4": {
        "text_config": LLAMA4 | {key: value for key, value in tiny.COMMON.items() if key not in LLAMA4},
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "image_size": 28,
            "patch_size": 14,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
    "longcat_flash": LATENT
    | {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2},
    "mellum": DENSE_THEN_SPARSE | SLIDING_THEN_FULL,
    "mimo_v2_flash": DENSE_THEN_SPARSE | SLIDING_THEN_FULL,
    "ministral": SLIDING_THEN_FULL,
    "olmo3": SLIDING_THEN_FULL,
    "qwen3_5_moe_text": GATED_DELTA_NET,
    "qwen3_5_text": GATED_DELTA_NET,
    "qwen3_next": GATED_DELTA_NET,
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
}

# Types whose default config leaves open what a model needs: the sizes of a published one, or the config's own elsewhere.
FILLED: dict[str, dict[str, object]] = {
    "cohere_compass_text": {"rope_parameters": MROPE},
    "dbrx": {
        "d_model": 6144,
        "n_heads": 48,
        "n_layers": 40,
        "vocab_size": 100352,
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000.0},
        "ffn_config": {"hidden_size": 6144, "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 16,
    },
}

# Of the families that the first pull request for plain tensors in transformers (#43157) was tried on, those that are no type
# with a plan: where their language model is checked.
ELSEWHERE = {
    "aria": "its language model is `aria_text`",
}

OURS = (
    "bamba",
    "biogpt",
    "bloom",
    "codegen",
    "dbrx",
    "diffllama",
    "emu3",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_oss",
    "gptj",
    "hunyuan_v1_dense",
    "lfm2",
    "mpt",
    "opt",
    "persimmon",
    "stablelm",
    "xglm",
    "zaya",
)
"""Types to which shardwise gives a plan, transformers none."""

TEXT = {"emu3": "emu3_text_model"}
"""Of types whose causal-LM class is that of a part: the part."""


def build(name: str, **options: object) -> PreTrainedModel:
    """The tiny model in float32, the same in every process, with these options of its config besides those it needs."""
    model = tiny.build(TEXT.get(name, name), **OPTIONS.get(name, {}) | options)
    pad = getattr(model.config, "pad_token_id", None)
    if name == "youtu" and pad is not None:  # loading zeroes the pad token's row, so a checkpoint saved again has zeros there
        with torch.no_grad():
            model.get_input_embeddings().weight[pad] = 0
    return model


def on_meta(name: str, **options: object) -> PreTrainedModel:
    """The model of `build` without memory."""
    return tiny.on_meta(TEXT.get(name, name), **OPTIONS.get(name, {}) | options)


def fields(name: str) -> dict[str, object]:
    """What the tiny config says, by field, without what differs between layers."""
    config, found = tiny.config(TEXT.get(name, name), **OPTIONS.get(name, {})), {}
    for key in sorted(tiny.known(TEXT.get(name, name))):
        try:
            found[key] = getattr(config, key)
        except (AttributeError, RuntimeError):
            continue
    return found


def default(name: str) -> PreTrainedConfig:
    """The config as transformers has it by default, its open fields filled."""
    return AutoConfig.for_model(name, **FILLED.get(name, {}))


@cache
def types() -> tuple[str, ...]:
    """Every causal-LM type whose config has a plan for tensor parallelism, and `OURS`, in alphabetical order."""
    return tuple(sorted(filter(_has_plan, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))


def _has_plan(name: str) -> bool:
    return name in OURS or bool(getattr(CONFIG_MAPPING[name], "base_model_tp_plan", None))
