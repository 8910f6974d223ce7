"""Linear attention by the delta rule, cut between its heads: gated delta nets (arXiv:2412.06464) and Kimi delta attention
(arXiv:2510.26692).

Everything between the projections belongs to a head: channels of the short convolution, gates, the recurrent state. Value heads
may be more than key heads: then neighbouring ones read one key head, as queries read a KV head, and where there are fewer key
heads than ranks, neighbouring ranks keep the same one. Caches are as large as the local heads, as they are made from these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from shardwise.heads import Heads
from shardwise.layers import Cut
from shardwise.layout import Block
from shardwise.plan import wildcard
from shardwise.plans.parts import mixer
from shardwise.spec import Rule

HEADS = "linear attention, cut between its heads"
_NUMBERS = "linear attention splits and reshapes by these numbers"
_LATENT = "from a latent of one head's width, which all heads read"
_LARGE = (
    *("in_proj_qkvz", "in_proj_qkv", "in_proj_z", "q_proj", "k_proj", "v_proj", "g_proj", "g_b_proj"),
    *("forget_gate.f_proj", "forget_gate.f_b_proj", "out_proj", "o_proj"),
)


def gated_delta_net(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for every gated delta net on `size` ranks; those whose heads can't be dealt to them are computed whole."""
    return _all(model, prefix, size, "layers.*.linear_attn")


def delta_attention(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for every Kimi delta attention on `size` ranks; those whose heads can't be dealt to them are computed whole."""
    return _all(model, prefix, size, "layers.*.self_attn")


def dealt(name: str, module: Any, size: int) -> list[Rule] | None:
    """The rules for module `name` on `size` ranks; None of one that is no such mixer, or whose heads can't be dealt."""
    heads = _heads(module)
    if heads is None or _problem(module, heads, size):
        return None
    return _net(name, module, heads, size) if hasattr(module, "num_v_heads") else _attention(name, module, heads, size)


def _all(model: nn.Module, prefix: str, size: int, path: str) -> list[Rule]:
    found: list[Rule] = []
    for name, module in model.named_modules():
        # Others of the same name are attention.
        if wildcard(name) == path and (heads := _heads(module)) is not None:
            rules = dealt(prefix + name, module, size)
            found += _whole(model, prefix, name, _problem(module, heads, size)) if rules is None else rules
    return found


def _heads(module: Any) -> Heads | None:
    if not hasattr(module, "conv1d"):
        return None
    if hasattr(module, "num_v_heads") and hasattr(module, "num_k_heads"):
        return Heads(module.num_v_heads, module.num_k_heads)
    return Heads(module.num_heads, module.num_heads) if hasattr(module, "forget_gate") else None


def _problem(module: Any, heads: Heads, size: int) -> str | None:
    # q, k, v and z lie key head by key head in one matrix, and ranks would share a part of one.
    torn = hasattr(module, "in_proj_qkvz") and heads.shared(size)
    return heads.problem(size) or (f"{heads.kv} groups of q, k, v and z cannot be split over tp={size}" if torn else None)


def _whole(model: nn.Module, prefix: str, name: str, problem: str | None) -> list[Rule]:
    return mixer(model, prefix, name, f"linear attention, computed whole: {problem}", _LARGE)


def _net(name: str, module: Any, heads: Heads, size: int) -> list[Rule]:
    key, value = heads.kv_cut(module.key_dim, size), heads.query_cut(module.value_dim, size)
    each = heads.query_cut(heads.query, size)
    blocks = (*(_block(module.key_dim, key),) * 2, _block(module.value_dim, value))
    together = Cut(unit=2 * (module.head_k_dim + value.unit))
    cuts = {
        "q_proj": key,
        "k_proj": key,
        "v_proj": value,
        "g_proj": value,
        "a_proj": each,
        "b_proj": each,
        "in_proj_qkv": Cut(blocks=blocks),
        "in_proj_z": value,
        "in_proj_a": each,
        "in_proj_b": each,
        "in_proj_qkvz": together,
        "in_proj_ba": Cut(unit=2 * heads.group),
    }
    keys = tuple(heads.local_kv(rank, size) for rank in range(size))
    values = tuple(heads.local_query(rank, size) for rank in range(size))
    numbers = {
        "num_k_heads": keys,
        "num_v_heads": values,
        "key_dim": tuple(number * module.head_k_dim for number in keys),
        "value_dim": tuple(number * module.head_v_dim for number in values),
    }
    return [*_around(name, module, cuts, value), *_between(name, module, blocks, numbers), *_gates(name, each, each)]


def _attention(name: str, module: Any, heads: Heads, size: int) -> list[Rule]:
    width = heads.query_cut(module.qkv_dim, size)
    each = heads.query_cut(heads.query, size)
    children = ("q_proj", "k_proj", "v_proj", "g_proj", "g_b_proj", "forget_gate.f_proj", "forget_gate.f_b_proj")
    local = tuple(heads.local_query(rank, size) for rank in range(size))
    numbers = {"num_heads": local, "qkv_dim": tuple(number * module.head_dim for number in local)}
    latents = [child for child in ("g_a_proj", "forget_gate.f_a_proj") if child in dict(module.named_modules())]
    return [
        *_around(name, module, {**dict.fromkeys(children, width), "b_proj": each}, width),
        *(Rule(f"{name}.{child}", "replicate", "shardwise", reason=_LATENT) for child in latents),
        *_between(name, module, (_block(module.qkv_dim, width),) * 3, numbers),
        *_gates(f"{name}.forget_gate", each, width),
        Rule(f"{name}.forget_gate", "local_params", "shardwise", attributes=numbers, reason=_NUMBERS),
    ]


def _block(length: int, cut: Cut) -> Block:
    return Block(length, cut.unit, cut.spread)


def _around(name: str, module: nn.Module, cuts: Mapping[str, Cut], output: Cut) -> Iterator[Rule]:
    """The projections of a mixer: those of `cuts` that it has, and the output's."""
    here = dict(module.named_modules())
    for child, cut in cuts.items():
        if child in here:
            yield Rule(f"{name}.{child}", "packed_colwise" if cut.blocks else "colwise", "shardwise", cut, reason=HEADS)
    child = "out_proj" if "out_proj" in here else "o_proj"
    yield Rule(f"{name}.{child}", "rowwise", "shardwise", output, reason="reads the local heads")


def _between(name: str, module: nn.Module, blocks: tuple[Block, ...], numbers: Mapping[str, tuple[int, ...]]) -> Iterator[Rule]:
    """What lies between the projections: the convolution over q | k | v, the norm, and numbers."""
    norm = "norm" if "norm" in module._modules else "o_norm"
    yield Rule(f"{name}.conv1d", "local_rows", "shardwise", Cut(blocks=blocks), reason="the channels of the local heads")
    yield Rule(f"{name}.{norm}", "replicated_with_grad_allreduce", "shardwise", reason="it sees the local heads only")
    # Of key heads that several ranks keep, it reads the convolution's channels itself.
    style = "local_mixer" if any(block.spread == "share" for block in blocks) else "local_params"
    yield Rule(name, style, "shardwise", attributes=numbers, reason=_NUMBERS)


def _gates(name: str, each: Cut, width: Cut) -> Iterator[Rule]:
    """The decay of each head, and its bias, one for each head or for each of its features."""
    yield Rule(f"{name}.A_log", "colwise", "shardwise", each, reason=HEADS)
    yield Rule(f"{name}.dt_bias", "colwise", "shardwise", width, reason=HEADS)
