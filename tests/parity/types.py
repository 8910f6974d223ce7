"""Every causal-LM type of transformers, as a tiny model, and at its default sizes those that have a plan."""

from __future__ import annotations

from functools import cache

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from parity.calls import CALLS, Call
from parity.job import Subject
from shardwise import tiny
from shardwise.tiny.sizes import MROPE

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

OURS = (
    "bamba",
    "biogpt",
    "bitnet",
    "bloom",
    "codegen",
    "dbrx",
    "diffllama",
    "emu3",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_oss",
    "gptj",
    "hunyuan_v1_dense",
    "lfm2",
    "lfm3",
    "mamba",
    "mamba2",
    "mpt",
    "opt",
    "persimmon",
    "recurrent_gemma",
    "rwkv",
    "stablelm",
    "xglm",
    "xlstm",
    "zamba",
    "zamba2",
    "zaya",
)
"""Types to which shardwise gives a plan by name, and transformers none."""


def build(name: str, **options: object) -> PreTrainedModel:
    """The tiny model in float32, the same in every process, with these options of its config besides those it needs."""
    call = CALLS.get(name, Call())
    with call.around():
        model = tiny.build(tiny.PARTS.get(name, name), **{**call.options, **options})
    pad = getattr(model.config, "pad_token_id", None)
    if name == "youtu" and pad is not None:  # loading zeroes the pad token's row, so a checkpoint saved again has zeros there
        with torch.no_grad():
            model.get_input_embeddings().weight[pad] = 0
    return model


def subject(name: str) -> Subject:
    """How a type is loaded and called."""
    call = CALLS.get(name, Call())
    return Subject(
        feeds=call.feeds(), arguments=call.arguments, generates=call.generates, around=call.around, target=call.target
    )


def on_meta(name: str, **options: object) -> PreTrainedModel:
    """The model of `build` without memory."""
    return tiny.on_meta(tiny.PARTS.get(name, name), **options)


def fields(name: str) -> dict[str, object]:
    """What the tiny config says, by field, without what differs between layers."""
    config, found = tiny.config(tiny.PARTS.get(name, name)), {}
    for key in sorted(tiny.known(tiny.PARTS.get(name, name))):
        try:
            found[key] = getattr(config, key)
        except (AttributeError, RuntimeError):
            continue
    return found


def default(name: str) -> PreTrainedConfig:
    """The config as transformers has it by default, its open fields filled."""
    return AutoConfig.for_model(name, **FILLED.get(name, {}))


@cache
def every() -> tuple[str, ...]:
    """Every causal-LM type, in alphabetical order."""
    return tuple(tiny.types())


@cache
def planned() -> tuple[str, ...]:
    """Those whose config has a plan for tensor parallelism, and `OURS`."""
    return tuple(filter(_has_plan, every()))


def _has_plan(name: str) -> bool:
    return name in OURS or bool(getattr(CONFIG_MAPPING[name], "base_model_tp_plan", None))
