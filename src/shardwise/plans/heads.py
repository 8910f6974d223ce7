"""Attention with a style of its own: Reformer's, XLNet's, ProphetNet's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from shardwise.layers import Cut
from shardwise.layout import local_numbers
from shardwise.plans.parts import WITHOUT, rule
from shardwise.spec import Rule

_HEADS = "its code counts heads, and these are dealt"
_SEEDS = "what is drawn anew in each forward pass is the same on all ranks"


def reformer(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Reformer: attention in chunks and by hashes, in layers that are computed backwards in backward."""
    path = f"{prefix}encoder.layers.*"
    places = _places(model, "num_attention_heads", "all_head_size")
    return [
        rule(path, "agreed_seeds", _SEEDS),
        *_chunked_mlp(f"{path}.feed_forward"),
        *(found for name, module in places for found in _hashed(prefix + name, module, size)),
    ]


def reformer_attention(name: str, module: Any, size: int) -> list[Rule] | None:
    """The rules for attention of a reversible layer, called `name`, on `size` ranks; None of any other, or with fewer heads."""
    inner, output = module._modules.get("self_attention"), module._modules.get("output")
    if not hasattr(inner, "all_head_size") or not hasattr(output, "dense") or inner.num_attention_heads < size:
        return None
    return [rule(name.rpartition(".")[0], "agreed_seeds", _SEEDS), *_hashed(f"{name}.self_attention", inner, size)]


def reformer_mlp(name: str, module: Any, size: int) -> list[Rule] | None:
    """The same for its MLP, which is computed in chunks."""
    inner, output = module._modules.get("dense"), module._modules.get("output")
    if not hasattr(module, "chunk_size_feed_forward") or not hasattr(inner, "dense") or not hasattr(output, "dense"):
        return None
    return _chunked_mlp(name) if inner.dense.out_features >= size else None


def _hashed(name: str, module: nn.Module, size: int) -> list[Rule]:
    """The inner attention of a reversible layer, whose output projection stands beside it."""
    inside = [child for child in ("query", "key", "query_key", "value") if hasattr(module, child)]
    style = "hashed_heads" if hasattr(module, "query_key") else "local_params"
    output = f"{name.rpartition('.')[0]}.output.dense"
    return _attention(name, module, size, inside, output, "num_attention_heads", style)


def _chunked_mlp(name: str) -> list[Rule]:
    return [rule(f"{name}.dense.dense", "colwise", WITHOUT), rule(f"{name}.output.dense", "rowwise", WITHOUT)]


def prophetnet(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """ProphetNet: attention over n-grams, and attention that is handed masks of all heads."""
    found = []
    for stack in ("encoder", "decoder"):
        path = f"{prefix}{stack}.layers.*.feed_forward"
        found += [rule(f"{path}.intermediate", "colwise", WITHOUT), rule(f"{path}.output", "rowwise", WITHOUT)]
    for name, module in _places(model, "num_attn_heads", "query_proj"):
        found += _ngrams(prefix + name, module, size)
    return found


def ngram_attention(name: str, module: Any, size: int) -> list[Rule] | None:
    """The rules for ProphetNet's attention, called `name`, on `size` ranks; None of any other, or with fewer heads."""
    if not {*_PROJECTIONS, "out_proj"} <= module._modules.keys() or getattr(module, "num_attn_heads", 0) < size:
        return None
    return _ngrams(name, module, size)


_PROJECTIONS = ("query_proj", "key_proj", "value_proj")


def _ngrams(name: str, module: nn.Module, size: int) -> list[Rule]:
    found = _attention(name, module, size, _PROJECTIONS, f"{name}.out_proj", "num_attn_heads", "ngram_heads")
    if hasattr(module, "ngram"):
        found.append(rule(f"{name}.relative_pos_embeddings", "replicate", "its code mixes heads and positions"))
    return found


def xlnet(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """XLNet: products by einsum with (features, heads, dims)."""
    path = f"{prefix}layer.*.rel_attn"
    cut = ("q", "k", "v", "r", "o", "seg_embed", "r_w_bias", "r_r_bias", "r_s_bias")
    heads = [name for name, _ in _places(model, "r_w_bias", "seg_embed")]
    return [
        rule(path, "products", "parameters of (features, heads, dims), cut between heads"),
        *(Rule(f"{prefix}{name}.{child}", "colwise", "shardwise", Cut(), reason=WITHOUT) for name in heads for child in cut),
        rule(f"{prefix}layer.*.ff.layer_1", "colwise", WITHOUT),
        rule(f"{prefix}layer.*.ff.layer_2", "rowwise", WITHOUT),
    ]


def _places(model: nn.Module, *having: str) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if all(hasattr(module, child) for child in having))


def _attention(
    name: str, module: nn.Module, size: int, inside: Sequence[str], output: str, count: str, style: str
) -> list[Rule]:
    """Projections and an output cut between heads, in a module whose code counts them by the attribute `count`."""
    heads, width = getattr(module, count), getattr(module, inside[0]).out_features
    cut = Cut(unit=width // heads)
    local = local_numbers(heads, heads, size)
    return [
        *(Rule(f"{name}.{child}", "colwise", "shardwise", cut, reason=WITHOUT) for child in inside),
        Rule(output, "rowwise", "shardwise", cut, reason=WITHOUT),
        Rule(name, style, "shardwise", attributes={count: local}, reason=_HEADS),
    ]
