"""Norms over a head's features, between a projection that is cut by heads and attention.

Whether their gradient is a part depends on the projection's rule, not on the norm's: plans forget it (an option of the config
switches the norm on), and a rule of the user's for the projection makes a rule of the plan for the norm wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from shardwise.heads import Heads, heads_of
from shardwise.layers import ColwiseGatherOutput, ColwiseParallel
from shardwise.layers.registry import style_named
from shardwise.spec import Rule

_QUERY = (("q_proj", "query"), ("q_norm", "q_layernorm", "query_layernorm", "query_norm", "q_ln"))
_KEY = (("k_proj", "key"), ("k_norm", "k_layernorm", "key_layernorm", "key_norm", "k_ln"))
_VALUE = (("v_proj", "value"), ("v_norm", "value_norm"))


def head_norms(modules: Mapping[str, nn.Module], rules: Mapping[str, Rule], size: int) -> dict[str, Rule]:
    """The rules that the norms of attention modules need, given the `rules` that hold, by the name of the norm or its weight.

    A norm behind local heads gets its gradient summed; a weight of a row a head is cut by heads; of a norm over all heads at
    once the statistics are summed, of which a KV head that ranks share is as large a part as any other; behind whole heads
    nothing is summed. What the user says of a norm stands, and what was inferred.
    """
    found: dict[str, Rule] = {}
    for name, module in modules.items():
        if (heads := heads_of(module)) is None:
            continue
        for projection, norm, over_kv in _pairs(module):
            rule, known = rules.get(f"{name}.{projection}"), rules.get(f"{name}.{norm}")
            if known is not None and known.source in ("user", "inferred"):
                continue
            child, width = getattr(module, norm), getattr(getattr(module, projection), "out_features", None)
            for target, new in _rules(f"{name}.{norm}", child, heads, over_kv, width, rule, known, size):
                found[target] = new
    return found


def _pairs(module: nn.Module) -> Iterator[tuple[str, str, bool]]:
    for projections, norms in (_QUERY, _KEY, _VALUE):
        projection = next((p for p in projections if isinstance(getattr(module, p, None), nn.Module)), None)
        norm = next((n for n in norms if isinstance(getattr(getattr(module, n, None), "weight", None), Tensor)), None)
        if projection is not None and norm is not None:
            yield projection, norm, projections is not _QUERY[0]


def _rules(
    name: str,
    norm: nn.Module,
    heads: Heads,
    over_kv: bool,
    width: object,
    rule: Rule | None,
    known: Rule | None,
    size: int,
) -> Iterator[tuple[str, Rule]]:
    if rule is None or not _local(rule):
        if known is not None and style_named(known.style, str(known)).gradient_is_partial:
            yield name, Rule(name, "replicate", "shardwise", reason="the heads are whole here, and so is its gradient")
        return
    weight, count = norm.weight, heads.kv if over_kv else heads.query
    assert isinstance(weight, Tensor)
    length = weight.shape[0]
    cut = heads.kv_cut(length, size) if over_kv else heads.query_cut(length, size)
    if weight.dim() == 1 and length == width and count > 1 and heads.problem(size) is None:
        yield name, Rule(name, "sharded_norm", "shardwise", cut, reason="its statistics are over all heads")
    elif weight.dim() == 2 and length == count:
        yield f"{name}.weight", Rule(f"{name}.weight", "colwise", "shardwise", cut, reason="a row for each head")
    elif known is None:
        yield name, Rule(name, "replicated_with_grad_allreduce", "shardwise", reason="it sees the local heads only")


def _local(rule: Rule) -> bool:
    style = style_named(rule.style, str(rule))
    return issubclass(style, ColwiseParallel) and not issubclass(style, ColwiseGatherOutput)
