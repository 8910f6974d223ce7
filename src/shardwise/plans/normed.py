"""Attention and MLPs with statistics over all heads, or over the full width: on local features, as the statistics are summed.

Models' own plans gather what is normed, and compute it on every rank, or leave it whole.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from shardwise.heads import Heads, heads_of
from shardwise.plans.parts import modules_at, rule
from shardwise.spec import Rule

_HEADS, _WIDTH = "its statistics are over all heads", "its statistics are over the full width"
_LOCAL = "local heads, as the statistics of the norms behind it are summed"


def attentions(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for every such attention on `size` ranks. Whose heads can't be dealt stays as the model's plan has it."""
    places = modules_at(model, "layers.*.self_attn")
    return [found for name, module in places for found in attention(prefix + name, module, size) or ()]


def attention(name: str, module: Any, size: int) -> list[Rule] | None:
    """The rules for a module called `name` on `size` ranks; None of one without such norms, or whose heads can't be dealt.

    For norms of queries and keys, `shardwise.norms` has the rules.
    """
    heads, here = heads_of(module), module._modules
    if heads is None or heads.problem(size) or not {"q_proj", "k_proj", "v_proj", "o_proj"} <= here.keys():
        return None
    if "attn_sub_norm" not in here and not _over_all_heads(module, heads):
        return None
    found = [rule(f"{name}.{child}", "colwise", _LOCAL) for child in ("q_proj", "k_proj", "v_proj")]
    if "attn_sub_norm" in here:
        cut = heads.query_cut(module.attn_sub_norm.weight.numel(), size)
        found.append(Rule(f"{name}.attn_sub_norm", "sharded_norm", "shardwise", cut, reason=_HEADS))
    return [*found, rule(f"{name}.o_proj", "rowwise", "reads the local heads")]


def _over_all_heads(module: Any, heads: Heads) -> bool:
    norm, queries = (getattr(getattr(module, child, None), "weight", None) for child in ("q_norm", "q_proj"))
    return norm is not None and queries is not None and heads.query > 1 and norm.shape == queries.shape[:1]


def mlp(name: str, module: Any, size: int) -> list[Rule] | None:
    """The rules for module `name` on `size` ranks; None of one that is no MLP with statistics over its width."""
    here = module._modules
    normed, sparse = "ffn_sub_norm" in here, getattr(module, "activation_sparsity", 0.0) > 0
    if not {"gate_proj", "up_proj", "down_proj"} <= here.keys() or not (normed or sparse):
        return None
    found = [rule(f"{name}.{child}", "colwise", "its width is split") for child in ("gate_proj", "up_proj")]
    found.append(rule(f"{name}.down_proj", "rowwise", "reads the local width"))
    if normed:
        found.append(rule(f"{name}.ffn_sub_norm", "sharded_norm", _WIDTH))
    if sparse:
        found.append(rule(name, "sharded_statistics", "activation sparsity takes the mean and the deviation over its width"))
    return found


def bitnet(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """BitNet: Llama's layers, with a norm in front of each row-wise product."""
    mlps = modules_at(model, "layers.*.mlp")
    dealt = attentions(model, prefix, size)
    refused = [] if dealt else [rule(f"{prefix}layers.*.self_attn.{child}_proj", "colwise") for child in "qkv"]
    return [*dealt, *refused, *(found for name, module in mlps for found in mlp(prefix + name, module, size) or ())]
