"""Options that change the sharding, in every type that has them: exact beside one process, on 2 or 4 ranks.

`parity.options` says which there are, and which are switched together.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest

import shardwise
from parity.options import GROUPS, build, switched
from parity.suite import Suite
from parity.types import on_meta, planned
from shardwise.errors import PlanError

TYPES = [name for name in planned() if name != "llama4"]  # its language model is llama4_text, whose config it holds
ONE, THREE = GROUPS
WHOLE = {
    "flex_olmo",
    "inkling2_text",
    "inkling_text",
    "minimax_m2",
    "minimax_m3_vl_text",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "phi3",
    "phi4_multimodal",
    "zaya",
}
"""Types whose attention can be computed whole, from gathered q, k and v: heads that no number of ranks divides do no harm."""


@pytest.fixture(scope="module")
def suites(tmp_path_factory) -> dict[str, Suite]:
    """Checkpoints and plain models' figures with the options of each group, once a type."""
    return {group: Suite(tmp_path_factory.mktemp("options"), functools.partial(build, group)) for group in GROUPS}


@pytest.mark.parametrize("name", TYPES)
def test_one_kv_head_and_more(name, suites, shm2, shm4):
    """Guards: a KV head that four ranks keep, with its bias: gradients summed not at all or twice, saved other than once; ties
    (or their lack), biases, norms, caps, experts and pad ids of which the plan knows one form only.
    """
    if not switched(ONE, name):
        pytest.skip("it has none of these options")
    outcome = suites[ONE].outcome(name, shm4 if "one KV head" in switched(ONE, name) else shm2)
    assert not isinstance(outcome, PlanError), outcome
    assert outcome.wrong == ()


@pytest.mark.parametrize("name", TYPES)
def test_three_kv_heads_and_more(name, suites, shm2):
    """Guards: two KV heads on one rank and one on the other; no pad id; layers without experts, queries without a latent, KV
    layers without projections of their own, and attention masks, of which the plan knows one form only.
    """
    if not switched(THREE, name):
        pytest.skip("it has none of these options")
    outcome = suites[THREE].outcome(name, shm2)
    assert not isinstance(outcome, PlanError), outcome
    assert outcome.wrong == ()


# One for each way in which heads are gathered: the other types of `WHOLE` have the rules of one of these.
@pytest.mark.parametrize("name", ["inkling_text", "minimax_m2", "olmo2", "olmo_hybrid", "phi3", "zaya"])
def test_heads_computed_whole_need_not_divide(name, suites, shm4):
    """Guards: gathered q, k and v that are cut within a head, where 6 heads are on 4 ranks, and come back in another order."""
    outcome = suites[THREE].outcome(name, shm4)
    assert not isinstance(outcome, PlanError), outcome
    assert outcome.wrong == ()


@pytest.mark.parametrize("name", TYPES)
def test_heads_that_divide_no_way(name):
    """Guards: a late `view` error, or a message without a size that works: 6 query heads and 3 KV heads on 4 and on 8 ranks."""
    heads = switched(THREE, name).get("three KV heads")
    if heads is None:
        pytest.skip("it has no KV heads of their own number")
    model = on_meta(name, **heads)
    if name in WHOLE:
        assert [shardwise.plan(model, size).size for size in (4, 8)] == [4, 8]
        return
    with pytest.raises(
        PlanError,
        match=r"6 query heads and 3 KV heads cannot be split over tp=4.\n(.*\n)* +either  a tp_size of 1, 2, 3, 6, or\n",
    ):
        shardwise.plan(model, 4)
    # On eight ranks a layer of another kind may come first: one with as many KV heads as queries, or linear attention.
    with pytest.raises(PlanError, match=r"cannot be split over tp=8(.*\n)* +either  a tp_size of (1, 2, 3, |at most 4)"):
        shardwise.plan(model, 8)
    assert [shardwise.plan(model, size).size for size in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("group", "least"),
    [
        (
            ONE,
            {
                "one KV head": 86,
                "biases": 87,
                "ties": 98,
                "q and k norms": 4,
                "pad id of the last row": 102,
                "soft-caps": 10,
                "parallel residual": 1,
                "sparse layers": 24,
                "shared experts": 22,
                "load-balancing loss": 24,
                "routing weights": 25,
            },
        ),
        (
            THREE,
            {
                "three KV heads": 85,
                "no pad id": 102,
                "clipped q, k and v": 2,
                "dense layers": 27,
                "whole queries": 6,
                "sliding and full attention": 30,
                "shared KV layers": 3,
                "experts of a latent": 1,
                "gate of attention": 1,
            },
        ),
    ],
)
def test_options_are_switched(group, least):
    """Guards: an option that is renamed by a release, or does nothing any more, so that nothing of it is tested."""
    found = Counter(option for name in TYPES for option in switched(group, name))
    assert found.keys() == least.keys()
    assert found >= Counter(least)


def test_options_without_effect_are_left_out():
    """Guards: options that seem tested and are ignored by the model: NemotronH's code knows no ties and no pad id."""
    assert switched(ONE, "nemotron_h").keys() == {"one KV head", "biases", "routing weights"}
    assert switched(ONE, "llama").keys() == {"one KV head", "biases", "ties", "pad id of the last row"}
