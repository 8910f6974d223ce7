"""Where attention may be cut: every query head lies on the rank of its KV head, whatever the numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shardwise
from blocks import ATTENTION_PLAN, Attention
from shardwise import tiny
from shardwise.errors import PlanError
from shardwise.heads import Heads, heads_of
from shardwise.layout import Layout


@st.composite
def dealt(draw: st.DrawFn) -> tuple[Heads, int]:
    """Heads that can be dealt to a size."""
    heads = Heads(kv := draw(st.integers(1, 9)), kv)
    heads = Heads(kv * draw(st.integers(1, 6)), kv)
    return heads, draw(st.sampled_from([size for size in range(1, 17) if heads.problem(size) is None]))


def held(layout: Layout, heads: int, width: int, rank: int, size: int) -> list[int]:
    """The heads that `rank` holds, each once and whole."""
    indices = torch.arange(heads).repeat_interleave(width)
    local = layout.shard(indices, rank, size).view(-1, width)
    assert (local == local[:, :1]).all()
    return local[:, 0].tolist()


@given(dealt(), st.integers(1, 3), st.integers(1, 3))
def test_a_query_lies_with_its_kv_head(case, query_width, kv_width):
    """Guards: cuts of q and of k and v that do not agree, so that a rank's queries attend to other heads' keys, in silence.

    The local module takes its queries in groups of `local_group`, one for each local KV head: the full model's pairing.
    """
    heads, size = case
    q = heads.query_cut(heads.query * query_width, size).along(0)
    kv = heads.kv_cut(heads.kv * kv_width, size).along(0)
    seen: list[int] = []
    for rank in range(size):
        queries = held(q, heads.query, query_width, rank, size)
        keys = held(kv, heads.kv, kv_width, rank, size)
        assert (len(queries), len(keys)) == (heads.local_query(rank, size), heads.local_kv(rank, size))
        group = heads.local_group(size)
        assert len(queries) == group * len(keys)
        assert [query // heads.group for query in queries] == [key for key in keys for _ in range(group)]
        seen += queries
    assert seen == list(range(heads.query))


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 16))
def test_problem_is_said_exactly_where_a_cut_fails(kv, group, size):
    """Guards: sizes refused that would work, and sizes allowed that leave a rank without a head or split one."""
    heads = Heads(kv * group, kv)
    cuts = heads.query_cut(heads.query * 2, size), heads.kv_cut(heads.kv * 2, size)
    problems = [cut.along(0).problem((length * 2,), size) for cut, length in zip(cuts, (heads.query, heads.kv), strict=True)]
    fits = not any(problems) and (not heads.shared(size) or heads.query % size == 0)
    assert (heads.problem(size) is None) == fits
    assert (size in heads.possible()) == (fits and size <= heads.query)


def test_problem_names_the_numbers():
    """Guards: a message that does not say which heads and how many ranks."""
    assert Heads(6, 2).problem(4) == "6 query heads and 2 KV heads cannot be split over tp=4"
    assert Heads(6, 2).possible() == [1, 2, 6]
    assert Heads(6, 6).problem(4) is None  # 2, 2, 1 and 1


class Named(nn.Module):
    """Anything with the given attributes, and perhaps a k_proj."""

    def __init__(self, width: int = 0, **attributes: object) -> None:
        super().__init__()
        self.__dict__.update(attributes)
        if width:
            self.k_proj = nn.Linear(4, width)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Named(num_heads=8, num_key_value_heads=2), Heads(8, 2)),
        (Named(num_heads=8), Heads(8, 8)),
        (Named(head_dim=4, config=SimpleNamespace(num_attention_heads=8, num_key_value_heads=4)), Heads(8, 4)),
        # A layer that differs from its config (a layer type with fewer KV heads) has the truth in its projection's width.
        (Named(8, head_dim=4, config=SimpleNamespace(num_attention_heads=8, num_key_value_heads=4)), Heads(8, 2)),
        (Named(num_heads=6, num_key_value_heads=4), None),
        (Named(), None),
        (Named(head_dim=4), None),
    ],
)
def test_heads_of(module, expected):
    """Guards: KV heads taken from a config that does not hold for this layer; heads found where there are none."""
    assert heads_of(module) == expected


@pytest.mark.parametrize(
    ("size", "rows", "group"),
    [(2, [(6, 3), (6, 3)], 2), (4, [(3, 3)] * 4, 1), (1, [(12, 6)], 2)],
)
def test_plan_of_grouped_heads(size, rows, group):
    """Guards: more ranks than KV heads (a `view` error in the first forward), or a group size that stays the full one."""
    table = shardwise.plan(
        nn.ModuleDict({"attn": Attention(kv_heads=2)}), size, {f"attn.{k}": v for k, v in ATTENTION_PLAN.items()}
    )
    q, k = table["attn.q_proj.weight"], table["attn.k_proj.weight"]
    assert [(q.local_shape(rank, size)[0], k.local_shape(rank, size)[0]) for rank in range(size)] == rows
    local = {row.name: dict(row.attributes) for row in table.modules}["attn"] if size == 4 else {}
    assert local.get("num_key_value_groups", (2,))[0] == group


def test_heads_that_cannot_be_dealt():
    """Guards: a late `view` error; the message names module, numbers, rule, and two ways out."""
    model = nn.ModuleDict({"attn": Attention(width=18, heads=6, kv_heads=2)})
    with pytest.raises(PlanError) as caught:
        shardwise.plan(model, 4, {f"attn.{k}": v for k, v in ATTENTION_PLAN.items()})
    text = str(caught.value)
    for part in (
        "attn.sinks: 6 query heads and 2 KV heads",
        "tp=4",
        "colwise",
        "(yours)",
        "tp_size of 1, 2, 6",
        "replicate",
    ):
        assert part in text


def test_latent_attention_has_no_kv_heads():
    """Guards: projections cut by a number of KV heads that multi-head latent attention does not have, or within a head."""
    model = tiny.on_meta("deepseek_v3", num_attention_heads=5, num_key_value_heads=3)
    assert heads_of(model.model.layers[0].self_attn) == Heads(5, 5)
