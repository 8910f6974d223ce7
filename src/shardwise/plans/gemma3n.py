"""Gemma 3n: statistics over the MLP's full width, and a second large embedding."""

from __future__ import annotations

from torch import nn

from shardwise.plans import normed
from shardwise.plans.parts import modules_at, rule, whole
from shardwise.spec import Rule


def rules(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The corrections for a model whose decoder layers are `{prefix}layers.*`."""
    small = "a low-rank projection between whole hidden states"
    below = [found for path in _LOW_RANK for found in whole(model, prefix, path, small)]
    return [*below, *gemma4(model, prefix, size), *_sparse_mlps(model, prefix, size)]


_LOW_RANK = ("altup_projections.*", "altup_unembed_projections.*", "layers.*.laurel", "layers.*.altup")
_PER_LAYER = ("per_layer_model_projection", "layers.*.per_layer_input_gate", "layers.*.per_layer_projection")


def streams(name: str, module: nn.Module, size: int) -> list[Rule] | None:
    """The rules for module `name`, which mixes the residual streams (AltUp): whole, as its code in training multiplies by the
    clamped weights of its layers itself. None of any other.
    """
    if not {"prediction_coefs", "correction_coefs"} <= module._modules.keys():
        return None
    reason = "small, and its code in training multiplies by these weights itself"
    return [rule(f"{name}.{child}", "replicate", reason) for child, _ in module.named_parameters()]


def gemma4(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The per-layer inputs, Gemma 4's too, which the model's plan forgets: their embedding is a third of the model's bytes."""
    small = "a narrow projection to the per-layer inputs or back, which would take two more collectives a layer"
    return [
        rule(f"{prefix}embed_tokens_per_layer", "embedding_rowwise", "the largest matrix of the model"),
        *(found for path in _PER_LAYER for found in whole(model, prefix, path, small)),
    ]


def assistant(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """A drafter for Gemma 4 whose head is read by rows, those of the likeliest clusters of tokens, past its module."""
    if getattr(model, "masked_embedding", None) is None:
        return []
    reason = "rows of it are read by another module, for the tokens that it chooses"
    return [rule(f"{prefix}{name}", "replicate", reason) for name in ("lm_head", "model.embed_tokens")]


def gemma4_vision(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Attention of the vision tower: the plan names what is inside of each projection, and cuts it anywhere in a head."""
    path, reason = f"{prefix}encoder.layers.*.self_attn", "attention of the vision tower, computed whole by every rank"
    children = [*(f"{child}_proj.linear" for child in "qkvo"), "q_norm", "k_norm"]
    return [rule(f"{path}.{child}", "replicate", reason) for child in children]


def _sparse_mlps(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    mlps = modules_at(model, "layers.*.mlp")
    found = [rule for name, module in mlps for rule in normed.mlp(prefix + name, module, size) or ()]
    return [rule for rule in found if rule.style == "sharded_statistics"]  # the model's plan has the rest
