"""Our own corrections and additions to the models' plans: one small file a family, each rule with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from shardwise.plans import apertus, completed, doge, gemma3n, inkling, phi3
from shardwise.spec import Rule

Corrections = Callable[[nn.Module, str, int], list[Rule]]

CORRECTIONS: Mapping[str, Corrections] = MappingProxyType(
    {
        "afmoe": completed.afmoe,
        "apertus": apertus.rules,
        "axk1": completed.latent,
        "bailing_hybrid": completed.delta_and_latent,
        "deepseek_v3": completed.latent,
        "deepseek_v4": completed.deepseek_v4,
        "doge": doge.rules,
        "exaone_moe": completed.shared_experts,
        "flint": completed.plain_attention,
        "gemma3n_text": gemma3n.rules,
        "gemma4_text": gemma3n.per_layer_embedding,
        "glm": completed.glm,
        "glm4": completed.glm,
        "glm4_moe_lite": completed.glm4_moe_lite,
        "granitemoe": completed.plain_attention,
        "granitemoehybrid": completed.granite,
        "granitemoeshared": completed.granite,
        "hunyuan_v1_moe": completed.hunyuan,
        "inkling2_text": inkling.inkling2,
        "inkling_text": inkling.inkling,
        "jamba": completed.jamba,
        "kimi_linear": completed.delta_and_latent,
        "lfm2_moe": completed.lfm2,
        "minimax": completed.minimax,
        "minimax_m3_vl_text": completed.minimax_m3,
        "nemotron_h": completed.nemotron_h,
        "olmo_hybrid": completed.olmo_hybrid,
        "phi3": phi3.rules,
        "phi4_multimodal": completed.phi4_multimodal,
        "phimoe": completed.plain_attention,
        "qwen2_moe": completed.shared_expert,
        "qwen4_exp_text": completed.qwen4,
        "solar_open": completed.shared_experts,
        "youtu": completed.latent,
    }
)


def corrections(model_type: str, model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """What shardwise adds to the plan of a model of `model_type`, whose plan's patterns are relative to `prefix`."""
    family = CORRECTIONS.get(model_type)
    return family(model, prefix, size) if family else []
