"""Tiny random models of the types whose plans shardwise corrects, with each kind of layer that the type has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

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

# What a type's config does not know is left out.
COMMON: dict[str, object] = {
    "vocab_size": 127,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 40,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
LATENT: dict[str, object] = {"num_key_value_heads": 4, "head_dim": 8}
DENSE_THEN_SPARSE: dict[str, object] = {"mlp_layer_types": ["dense", "sparse"]}
MAMBA2: dict[str, object] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2}
DELTA_NET: dict[str, object] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
INKLING: dict[str, object] = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 8,
    "layer_types": ["hybrid", "hybrid_sliding"],
}
NO_DROPOUT: dict[str, object] = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT: dict[str, object] = {
    "rotary_dim": 8,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
TINY: dict[str, dict[str, object]] = {
    "afmoe": {"layer_types": ["sliding_attention", "full_attention"]},
    "apertus": {},
    "axk1": LATENT | DENSE_THEN_SPARSE | {"n_group": 2, "topk_group": 1},
    "bailing_hybrid": LATENT
    | DENSE_THEN_SPARSE
    | {"layer_types": ["linear_attention", "full_attention"], "n_group": 2, "topk_group": 1},
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 42, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": LATENT | {"n_group": 2, "topk_group": 1},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
    },
    "diffllama": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "doge": {"keep_window_size": 6, "is_moe": True, "num_experts": 16},
    "emu3_text_model": {"attention_dropout": 0.0},
    "exaone_moe": DENSE_THEN_SPARSE | {"layer_types": ["sliding_attention", "full_attention"]},
    "flint": {"mlp_only_layers": [0], "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [96, 96],
        "activation_sparsity_pattern": [0.95, 0.0],
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 127,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 127,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe_lite": LATENT | DENSE_THEN_SPARSE,
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "intermediate_size": 64},
    "granitemoe": {},
    "granitemoehybrid": MAMBA2 | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    "granitemoeshared": {"shared_intermediate_size": 48},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "inkling2_text": INKLING | {"n_layers_per_attn_res_block": 2, "unpadded_vocab_size": 127, "log_scaling_n_floor": 4},
    "inkling_text": INKLING | DENSE_THEN_SPARSE | {"n_shared_experts": 2, "logits_mup_width_multiplier": 1.5},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "kimi_linear": LATENT
    | DENSE_THEN_SPARSE
    | {"layer_types": ["linear_attention", "full_attention"], "linear_num_heads": 4, "linear_head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minicpm3": LATENT,
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "minimax_m3_vl_text": DENSE_THEN_SPARSE | {"dense_intermediate_size": 96, "shared_intermediate_size": 48},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "moe", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
        "moe_shared_expert_intermediate_size": 48,
    },
    "olmo_hybrid": DELTA_NET | {"layer_types": ["linear_attention", "full_attention"]},
    "phi3": {},
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "crop_size": 28,
            "feature_layer": -1,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 1,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "input_size": 16,
            "nemo_conv_channels": 8,
            "feature_layer": -1,
        },
    },
    "phimoe": {},
    "qwen2_moe": {},
    "qwen4_exp_text": DELTA_NET
    | {
        "layer_types": ["linear_attention", "indexed_attention"],
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "solar_open": {"n_group": 1, "topk_group": 1},
    "youtu": LATENT,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "layer_types": ["hybrid", "hybrid_sliding"]},
    # Types without a plan of their own.
    "biogpt": NO_DROPOUT,
    "bloom": {},
    "codegen": GPT,
    "falcon": {"num_attention_heads": 8, "num_kv_heads": 4, "new_decoder_architecture": True, "ffn_hidden_size": 96},
    "gpt2": GPT,
    "gpt_bigcode": GPT | {"n_head": 4},  # of which it makes the number of KV heads
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gptj": GPT,
    "hunyuan_v1_dense": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mpt": {"max_seq_len": 64},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
    "persimmon": {},
    "stablelm": {},
    "xglm": NO_DROPOUT | {"ffn_dim": 96},
    # Types without corrections, for what every type goes through.
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2},
    "cohere": {},
    "dots3_note_text": LATENT
    | DENSE_THEN_SPARSE
    | {
        "layer_types": ["indexed_attention", "sliding_attention"],
        "head_dim": 24,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "n_group": 1,
        "topk_group": 1,
        "shared_experts_intermediate_size": 32,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "glm4_moe": {"n_group": 1, "topk_group": 1},
    "llama": {},
    "llama4_text": {
        "intermediate_size": 48,
        "intermediate_size_mlp": 96,
        "num_experts_per_tok": 1,
        "moe_layers": [1],
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "olmo2": {},
    "phi": {},
    "qwen3": {},
}


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
    return randomised(lambda: _empty(made, torch.float32))


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
        return _empty(config(name, **options))


def _empty(made: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    if type(made) is Emu3TextConfig:  # the Auto class knows the config around it alone
        return Emu3ForCausalLM._from_config(made, dtype=dtype)
    return AutoModelForCausalLM.from_config(made, dtype=dtype)
