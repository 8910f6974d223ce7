"""Every type's automatic plan, proven in one process: at other sizes, and with the flags of its config the other way round.

`parity.variants` says which configs these are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from parity.stand_ins import NOT_BUILT
from parity.types import every
from parity.variants import KEPT, Inferred, flipped, problem, problem_of_flags, problem_of_sizes, resized
from shardwise import tiny
from shardwise.hf import model_rules
from shardwise.layers import Cut
from shardwise.layout import Block
from shardwise.spec import Rule

TYPES = [name for name in every() if name not in NOT_BUILT]


def proven(problem_of: Callable[[str], str], name: str) -> None:
    """Check what a type's automatic plan is found to be."""
    try:
        assert problem_of(name) == ""
    except Inferred:
        pytest.skip("its plan is inferred, and proven there")


@pytest.mark.parametrize("name", TYPES)
def test_right_at_other_sizes(name):
    """Guards: a plan that is right for four heads, one width or an even vocabulary alone: other query heads, one KV head that 4
    ranks share, or four on 3 ranks; heads of which the config says another number than a layer has.
    """
    proven(problem_of_sizes, name)


@pytest.mark.parametrize("name", TYPES)
def test_right_with_other_flags(name):
    """Guards: biases, ties, norms, multi-query heads, cross-attention, experts of which a plan knows one form alone."""
    proven(problem_of_flags, name)


@pytest.mark.parametrize(("name", "heads", "size"), [("gpt_neox", 6, 4), ("gpt_neox", 4, 3)])
def test_heads_need_not_divide(name, heads, size):
    """Guards: fused heads that are cut straight through, where ranks have different numbers of them."""
    assert problem(tiny.config(name, num_attention_heads=heads, hidden_size=16 * heads), size) == ""


def heads_of_one_size(rule: Rule) -> Rule:
    """GPT-J's heads on each of 3 ranks, of a model that has 4."""
    return replace(rule, attributes={"num_attention_heads": (1, 1, 1, 1)}) if rule.attributes else rule


def one_after_the_other(rule: Rule) -> Rule:
    """GPT-BigCode's q | k | v, which lie head by head where there are as many KV heads as queries."""
    return replace(rule, cut=Cut(blocks=(Block(64, 16),) * 3)) if rule.style == "packed_colwise" else rule


def summed_by_nobody(rule: Rule) -> Rule:
    """Norms of local heads."""
    return replace(rule, style="replicate") if rule.style == "replicated_with_grad_allreduce" else rule


@pytest.mark.parametrize(
    ("name", "change", "problem_of", "said"),
    [
        ("gptj", heads_of_one_size, problem_of_sizes, r"^tp=3: RuntimeError: shape .* in transformer.h.0.attn"),
        ("gpt_bigcode", one_after_the_other, problem_of_flags, r"^tp=2: outputs on rank 0 are off by .* transformer.h.0.attn"),
        (
            "qwen3",
            summed_by_nobody,
            problem_of_flags,
            r"^tp=2: the gradient of model.layers.1.self_attn.[qk]_norm.weight is off",
        ),
    ],
    ids=["sizes", "flags", "gradients"],
)
def test_wrong_rule_is_found(name, change, problem_of, said, monkeypatch):
    """Guards: a check that no plan fails: each rule is right for another config, or in forward."""
    assert problem_of(name) == ""
    monkeypatch.setattr(
        "shardwise.planning.model_rules", lambda *args, **options: [change(r) for r in model_rules(*args, **options)]
    )
    assert re.search(said, problem_of(name))


def test_configs_are_others():
    """Guards: sizes or flags that are the same again, which test nothing; plans that nobody proves as all are inferred."""
    kv_heads, flags = [], []
    for name in TYPES:
        base, other = tiny.config(tiny.PARTS.get(name, name)).get_text_config(), next(resized(name)).get_text_config()
        assert other.vocab_size == 133 != base.vocab_size
        kv_heads.append(getattr(other, "num_key_value_heads", None))
        mine, theirs = vars(tiny.config(tiny.PARTS.get(name, name))), vars(flipped(name))
        changed = {field for field, value in mine.items() if isinstance(value, bool) and theirs[field] is (not value)}
        flags.append(len(changed))
        assert not changed & set(KEPT.get(name, ()))
    assert sum(count > 0 for count in flags) > 180
    assert kv_heads.count(1) > 50
    assert len(TYPES) - kv_heads.count(1) - kv_heads.count(None) > 60
