"""Phi-4 multimodal: Phi-3's decoder, and encoders of images and sounds, which are more than a quarter of the model."""

from __future__ import annotations

from torch import nn

from shardwise.heads import heads_of
from shardwise.plan import wildcard
from shardwise.plans import phi3
from shardwise.plans.parts import attention, mlp, packed_mlp, rule, whole
from shardwise.spec import Rule

_IMAGE, _SOUND = "embed_tokens_extend.image_embed", "embed_tokens_extend.audio_embed"
_IMAGES, _SOUNDS = f"{_IMAGE}.img_processor.encoder.layers.*", f"{_SOUND}.encoder.encoders.*"


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The corrections for a model whose decoder layers are `{prefix}layers.*`, on `size` ranks."""
    cut = [*_images(model, prefix, size), *_sounds(model, prefix, size)]
    patterns = {found.pattern for found in cut}
    reason = "convolutions and a pooling head of the encoders, which run once a prompt"
    rest = whole(model, prefix, "embed_tokens_extend", reason)
    return [
        *phi3.rules(model, prefix, size),
        *(found for found in rest if wildcard(found.pattern).rpartition(".")[0] not in patterns),
        *cut,
    ]


def _images(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    path = f"{_IMAGES}.self_attn"
    heads = attention(model, prefix, path, output="out_proj") if _divides(model, path, size) else []
    return [
        *heads,
        *mlp(prefix, f"{_IMAGES}.mlp", ["fc1"], "fc2"),
        *mlp(prefix, f"{_IMAGE}.img_processor.head.mlp", ["fc1"], "fc2"),
        *mlp(prefix, _IMAGE, ["img_projection_up"], "img_projection_down"),
    ]


def _sounds(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    path = f"{_SOUNDS}.self_attn"
    bias = rule(f"{prefix}{path}", "local_head_bias", "its mask has a relative position bias of all heads in it")
    heads = [*attention(model, prefix, path), bias] if _divides(model, path, size) else []
    mlps = [found for part in ("in", "out") for found in packed_mlp(prefix, f"{_SOUNDS}.feed_forward_{part}")]
    both = ("speech", "vision_speech")
    joints = [found for to in both for found in mlp(prefix, _SOUND, [f"up_proj_for_{to}"], f"down_proj_for_{to}")]
    first = rule(f"{prefix}{_SOUND}.encoder.embed.out", "colwise_gather_output", "from all features of a stretch of sound")
    return [*heads, *mlps, *joints, first]


def _divides(model: nn.Module, path: str, size: int) -> bool:
    # An encoder with few heads stays whole rather than forbid what the decoder allows.
    heads = next((heads_of(module) for name, module in model.named_modules() if wildcard(name) == path), None)
    return heads is not None and heads.problem(size) is None
