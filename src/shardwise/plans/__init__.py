"""Our own corrections and additions to the models' plans: one small file a family, each rule with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from shardwise.plans import (
    apertus,
    completed,
    convolution,
    dbrx,
    decoders,
    delta,
    diffllama,
    doge,
    gemma3n,
    gpt_oss,
    heads,
    inkling,
    lightning,
    normed,
    phi3,
    phi4_multimodal,
    recurrent,
    state_space,
    xlstm,
    zaya,
)
from shardwise.plans.parts import rule
from shardwise.spec import Rule

Corrections = Callable[[nn.Module, str, int], list[Rule]]

CORRECTIONS: Mapping[str, Corrections] = MappingProxyType(
    {
        "afmoe": completed.afmoe,
        "apertus": apertus.rules,
        "axk1": completed.latent,
        "axk2": completed.latent_queries,
        "bailing_hybrid": completed.delta_and_latent,
        "bamba": completed.mamba2_and_attention,
        "biogpt": decoders.biogpt,
        "bitnet": normed.bitnet,
        "bloom": decoders.bloom,
        "codegen": decoders.codegen,
        "dbrx": dbrx.rules,
        "deepseek_v2": completed.latent_queries,
        "deepseek_v3": completed.latent,
        "deepseek_v32": completed.latent_queries,
        "deepseek_v4": completed.deepseek_v4,
        "diffllama": diffllama.rules,
        "doge": doge.rules,
        "dots3_note_text": completed.latent_queries,
        "emu3_text_model": completed.plain_decoder,
        "exaone_moe": completed.shared_experts,
        "falcon": decoders.falcon,
        "falcon_h1": completed.mamba2_and_attention,
        "falcon_mamba": state_space.mamba_alone,
        "flex_olmo": normed.attentions,
        "flint": completed.plain_attention,
        "gemma3n_text": gemma3n.rules,
        "gemma4_assistant": gemma3n.assistant,
        "gemma4_text": gemma3n.gemma4,
        "gemma4_unified_assistant": gemma3n.assistant,
        "gemma4_vision": gemma3n.gemma4_vision,
        "glm": completed.glm,
        "glm4": completed.glm,
        "glm4_moe_lite": completed.glm4_moe_lite,
        "glm5_next_text": completed.delta_and_latent,
        "glm_moe_dsa": completed.latent_queries,
        "gpt2": decoders.gpt2,
        "gpt_bigcode": decoders.gpt_bigcode,
        "gpt_neo": decoders.gpt_neo,
        "gpt_oss": gpt_oss.rules,
        "gptj": decoders.gptj,
        "granitemoe": completed.plain_attention,
        "granitemoehybrid": completed.granite,
        "granitemoeshared": completed.granite,
        "hunyuan_v1_dense": completed.plain_decoder,
        "hunyuan_v1_moe": completed.hunyuan,
        "hy_v4": completed.latent_queries,
        "inkling2_text": inkling.inkling2,
        "inkling_text": inkling.inkling,
        "jamba": completed.jamba,
        "kimi_linear": completed.delta_and_latent,
        "lfm2": convolution.lfm2,
        "lfm2_moe": convolution.lfm2,
        "lfm3": convolution.lfm3,
        "mamba": state_space.mamba_alone,
        "mamba2": state_space.mamba2_alone,
        "minicpm3": completed.wide_latent_alone,
        "minimax": lightning.rules,
        "minimax_m2": normed.attentions,
        "minimax_m3_vl_text": completed.minimax_m3,
        "mistral_large4_text": completed.mistral_large4,
        "mpt": decoders.mpt,
        "nemotron_h": completed.nemotron_h,
        "olmo2": normed.attentions,
        "olmo3": normed.attentions,
        "olmo_hybrid": completed.olmo_hybrid,
        "olmoe": normed.attentions,
        "opt": decoders.opt,
        "persimmon": decoders.persimmon,
        "phi3": phi3.rules,
        "phi4_multimodal": phi4_multimodal.rules,
        "phimoe": completed.plain_attention,
        "prophetnet": heads.prophetnet,
        "qwen2_moe": completed.shared_expert,
        "qwen3_vl_text": completed.plain_decoder,
        "qwen3_5_moe_text": delta.gated_delta_net,
        "qwen3_5_text": delta.gated_delta_net,
        "qwen3_next": delta.gated_delta_net,
        "qwen4_exp_text": completed.qwen4,
        "recurrent_gemma": recurrent.recurrent_gemma,
        "rwkv": recurrent.rwkv,
        "reformer": heads.reformer,
        "solar_open": completed.shared_experts,
        "stablelm": decoders.stablelm,
        "step3p5": completed.step3p5,
        "xglm": decoders.xglm,
        "xlstm": xlstm.rules,
        "xlnet": heads.xlnet,
        "youtu": completed.wide_latent,
        "zamba": state_space.zamba,
        "zamba2": state_space.zamba2,
        "zaya": zaya.rules,
    }
)


SORTED_EXPERTS: Mapping[str, str] = MappingProxyType({"llama4_text": "layers.*.feed_forward.experts"})
"""Where the experts are, relative to the base model, of types whose experts take their rows sorted by expert."""


def dealt_experts(model_type: str, model: nn.Module, prefix: str) -> list[Rule]:
    """The rules for expert parallelism that shardwise adds to those of a model of `model_type`; arguments as `corrections`."""
    if model_type == "dbrx":
        return dbrx.dealt(model, prefix)
    path = SORTED_EXPERTS.get(model_type)
    if path is None:
        return []
    stacked = [rule(f"{prefix}{path}.{child}", "grouped_gemm", "experts, stacked") for child in ("gate_up_proj", "down_proj")]
    return [*stacked, rule(prefix + path, "ep_sorted_experts", "each rank computes the rows of its own experts")]


def corrections(model_type: str, model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """What shardwise adds to the plan of a model of `model_type`, whose plan's patterns are relative to `prefix`."""
    family = CORRECTIONS.get(model_type)
    return family(model, prefix, size) if family else []
