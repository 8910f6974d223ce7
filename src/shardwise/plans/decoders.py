"""Older decoders that have no plan of their own: GPT-2 and what came after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import nn

from shardwise.heads import heads_of
from shardwise.layers import Cut
from shardwise.layout import Block
from shardwise.plan import wildcard
from shardwise.plans.fused import Counted, Fused, count, gathered, separate_attention
from shardwise.plans.parts import WITHOUT, mlp, modules_at, rule, whole
from shardwise.spec import Rule

_GROUPS = 4


def gpt2(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """GPT-2: fused attention, weights kept as (in, out)."""
    attention = Fused("h.*.attn", "c_attn", "c_proj", {"split_size": "query width", "num_heads": "query"})
    crossed = [
        found for name, module in modules_at(model, "h.*.crossattention") for found in _cross(prefix + name, module, size)
    ]
    mlps = _mlp(prefix, "h.*.mlp", "c_fc", "c_proj")
    return [*attention.rules(model, prefix, size), *crossed, *mlps, _positions(f"{prefix}wpe")]


def _cross(name: str, module: Any, size: int) -> list[Rule]:
    """GPT-2's attention to an encoder's states, of which keys and values are one matrix."""
    heads = heads_of(module)
    if heads is None or heads.problem(size):
        return gathered(name, ["q_attn", "c_attn"], "c_proj", "its heads can't be dealt to this many ranks")
    counted, width = count(heads, module.head_dim, size), heads.query * module.head_dim
    cut = heads.query_cut(width, size)
    block, local = Block(width, cut.unit), {"split_size": counted["query width"], "num_heads": counted["query"]}
    reason = "k and v, each cut between its heads; attention reshapes them by these numbers"
    fused = Rule(f"{name}.c_attn", "packed_colwise", "shardwise", Cut(blocks=(block, block)), {}, local, reason)
    ends = (("q_attn", "colwise"), ("c_proj", "rowwise"))
    return [fused, *(Rule(f"{name}.{child}", style, "shardwise", cut, reason=WITHOUT) for child, style in ends)]


def gpt_bigcode(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """GPT-BigCode: fused attention, with one KV head (q | k | v), or with one for each query head (head by head)."""
    attention = Fused(
        "h.*.attn",
        "c_attn",
        "c_proj",
        {"embed_dim": "query width", "num_heads": "query", "num_key_value_groups": "group"},
    )
    interleaved = not getattr(model.config, "multi_query", False)
    rules = replace(attention, interleaved=interleaved).rules(model, prefix, size)
    return [*rules, *_mlp(prefix, "h.*.mlp", "c_fc", "c_proj"), _positions(f"{prefix}wpe")]


def gptj(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """GPT-J: attention and MLP side by side."""
    attention = separate_attention(model, prefix, "h.*.attn", size, "out_proj", {"num_attention_heads": "query"})
    return [*attention, *_mlp(prefix, "h.*.mlp", "fc_in", "fc_out")]


def gpt_neo(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """GPT-Neo: global and local attention in turns."""
    attention = separate_attention(model, prefix, "h.*.attn.attention", size, "out_proj", {"num_heads": "query"})
    return [*attention, *_mlp(prefix, "h.*.mlp", "c_fc", "c_proj"), _positions(f"{prefix}wpe")]


def codegen(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """CodeGen: attention and MLP side by side. q, v and k lie in four groups of heads (q v k | q v k | ...), for four chips of
    the hardware it was made on, and its code looks for four groups, whatever the number of ranks: each rank gets its part of
    each.
    """
    found = _mlp(prefix, "h.*.mlp", "fc_in", "fc_out")
    for place, module in model.named_modules():
        if wildcard(place) == "h.*.attn":
            own = in_groups(prefix + place, module, size)
            reason = f"its heads lie in {_GROUPS} groups, and ranks would have uneven parts of one"
            found += gathered(prefix + place, ["qkv_proj"], "out_proj", reason) if own is None else own
    return found


def in_groups(name: str, module: Any, size: int) -> list[Rule] | None:
    """The rules for module `name` on `size` ranks; None of one that is no such attention, or whose groups can't be dealt."""
    split = getattr(module, "_split_heads", None)
    if "qkv_proj" not in module._modules or split is None or "mp_num" not in signature(split).parameters:
        return None
    heads, width = module.num_attention_heads, module.head_dim
    if heads % (_GROUPS * size):
        return None
    group, local = Block(heads * width // _GROUPS, width), {"num_attention_heads": (heads // size,) * size}
    rows, columns = Cut(blocks=(group,) * 3 * _GROUPS), Cut(blocks=(group,) * _GROUPS)
    reason = f"{_GROUPS} groups of q, v and k, each cut between its heads; attention reshapes by this number"
    return [
        Rule(f"{name}.qkv_proj", "packed_colwise", "shardwise", rows, parent_attributes=local, reason=reason),
        Rule(f"{name}.out_proj", "packed_rowwise", "shardwise", columns, reason="reads the local heads of each group"),
    ]


def opt(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """OPT: an MLP that is part of the layer. Its base model and the decoder in it are both of this type."""
    if hasattr(model, "decoder"):
        return []
    return biogpt(model, prefix, size)


def biogpt(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """BioGPT: an MLP that is part of the layer."""
    attention = separate_attention(model, prefix, "layers.*.self_attn", size, "out_proj", {"num_heads": "query"})
    return [*attention, *_mlp(prefix, "layers.*", "fc1", "fc2"), _positions(f"{prefix}embed_positions")]


def xglm(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """XGLM: as BioGPT, with computed positions."""
    attributes: dict[str, Counted] = {"num_heads": "query", "embed_dim": "query width"}
    paths = ("layers.*.self_attn", "layers.*.encoder_attn")
    attention = [found for path in paths for found in separate_attention(model, prefix, path, size, "out_proj", attributes)]
    return [*attention, *_mlp(prefix, "layers.*", "fc1", "fc2")]


def stablelm(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """StableLM: Llama's layers; optionally a norm for each head."""
    path = "layers.*.self_attn"
    attributes: dict[str, Counted] = {"num_heads": "query", "num_key_value_heads": "kv"}
    if getattr(model.config, "qk_layernorm", False):
        projections = ["q_proj", "k_proj", "v_proj"]
        attention = _gathered(model, prefix, path, projections, "o_proj", "each head has a norm of its own")
    else:
        attention = separate_attention(model, prefix, path, size, "o_proj", attributes)
    return [*attention, *mlp(prefix, "layers.*.mlp")]


def persimmon(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Persimmon: fused attention, head by head, with norms over a head's features."""
    path = "layers.*.self_attn"
    attention = Fused(path, "query_key_value", "dense", {"num_heads": "query"}, interleaved=True)
    summed = "replicated_with_grad_allreduce"
    norms = [rule(f"{prefix}{path}.{name}_layernorm", summed, "it sees the local heads only") for name in ("q", "k")]
    return [*attention.rules(model, prefix, size), *norms, *_mlp(prefix, "layers.*.mlp", "dense_h_to_4h", "dense_4h_to_h")]


def bloom(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """BLOOM: fused attention with ALiBi."""
    path = "h.*.self_attention"
    if getattr(model.config, "slow_but_exact", False) and getattr(model.config, "pretraining_tp", 1) > 1:
        reason = "slow_but_exact: it multiplies by slices of the weights itself"
        return [found for part in (path, "h.*.mlp") for found in whole(model, prefix, part, reason)]
    attention = Fused(path, "query_key_value", "dense", {"num_heads": "query"}, "gather", interleaved=True, biased=True)
    return [*attention.rules(model, prefix, size), *_mlp(prefix, "h.*.mlp", "dense_h_to_4h", "dense_4h_to_h")]


def mpt(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """MPT: fused attention with ALiBi."""
    attention = Fused("blocks.*.attn", "Wqkv", "out_proj", {"n_heads": "query"}, "gather", biased=True)
    return [*attention.rules(model, prefix, size), *_mlp(prefix, "blocks.*.ffn", "up_proj", "down_proj")]


def falcon(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Falcon: fused attention, with one KV head (q | k | v), or groups of heads (q q k v | q q k v); optionally ALiBi."""
    config = model.config
    one = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    attributes: dict[str, Counted] = {"num_heads": "query"} if one else {"num_heads": "query", "num_kv_heads": "kv"}
    alibi = bool(getattr(config, "alibi", False))
    attention = Fused("h.*.self_attention", "query_key_value", "dense", attributes, "gather", interleaved=not one, biased=alibi)
    return [*attention.rules(model, prefix, size), *_mlp(prefix, "h.*.mlp", "dense_h_to_4h", "dense_4h_to_h")]


def _mlp(prefix: str, path: str, up: str, down: str) -> list[Rule]:
    return [rule(f"{prefix}{path}.{up}", "colwise", WITHOUT), rule(f"{prefix}{path}.{down}", "rowwise", WITHOUT)]


def _positions(name: str) -> Rule:
    return rule(name, "replicate", "one row a position: small")


def _gathered(model: nn.Module, prefix: str, path: str, projections: Sequence[str], output: str, reason: str) -> list[Rule]:
    names = [name for name, _ in model.named_modules() if wildcard(name) == path]
    return [found for name in names for found in gathered(prefix + name, projections, output, reason)]
