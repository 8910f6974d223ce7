"""Our corrections of the models' plans: that each fits and is needed. `test_architectures.py` checks the numbers they give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

import shardwise
from figures import gradient_error, gradients
from shardwise.errors import PlanError
from shardwise.hf import model_rules
from shardwise.layers import ShardedNorm
from shardwise.plans import CORRECTIONS, SORTED_EXPERTS
from shardwise.spec import Rule
from shardwise.testing import RankError, RankPool
from shardwise.tiny import build, on_meta
from shardwise.tiny.sizes import TINY

LOGITS = 1e-4  # float32 sums of some 100 terms of order 1 differ by 1e-6; a lost or doubled term is of order 1e-2 at least
GRADIENTS = 1e-3  # relative; what is not summed, or summed twice, is wrong by half of itself or by itself

# The others are text models inside a wrapper only: `test_wrappers.py` checks them there.
ALONE = [name for name in CORRECTIONS if name in TINY]

# The plans that transformers has for the types that shardwise corrects, a type a line, in the release that `pyproject.toml`
# pins for the tests: what our corrections were made for.
OWN_PLANS = Path(__file__).with_name("own_plans.json")

DEALT = ["afmoe", "flint", "inkling_text", "nemotron_h", "qwen4_exp_text", "aria_text", "gpt_oss", "llama4_text", "zaya"]


@dataclass(frozen=True)
class Numbers:
    """Logits of two micro-batches, their accumulated gradients (None on all ranks but the first), and greedy tokens."""

    logits: Tensor
    gradients: dict[str, Tensor] | None
    tokens: Tensor


def numbers(name: str, plan: Mapping[str, str] | None, options: Mapping[str, object], ep_size: int | None = None) -> Numbers:
    """Of the tiny model, in this process, or with a plan ({}: the automatic one) on all ranks, be it wrong."""
    model = build(name, **options).train()
    if plan is not None:
        table = shardwise.plan(model, dist.get_world_size(), plan, ep_size=ep_size)
        shardwise.parallelize(model, plan=table, ep_size=ep_size)
    ids, seen = torch.randint(3, 127, (2, 12), generator=torch.Generator().manual_seed(1)), []
    for batch in (ids, ids.flip(1)):
        torch.manual_seed(0)  # for a router that draws
        output = model(input_ids=batch, labels=batch)
        output.loss.backward()
        seen.append(output.logits.detach())
    accumulated = gradients(model)
    model.zero_grad()
    tokens = model.eval().generate(ids[:1], max_new_tokens=6, do_sample=False)
    return Numbers(torch.stack(seen), accumulated, tokens)


def errors(actual: Numbers, expected: Numbers) -> tuple[float, float]:
    """The largest error of the logits, and of any gradient relative to its size."""
    assert actual.gradients is not None
    assert expected.gradients is not None
    return (actual.logits - expected.logits).abs().max().item(), gradient_error(actual.gradients, expected.gradients)


def compare(
    pool: RankPool, name: str, plan: Mapping[str, str], ep_size: int | None = None, **options: object
) -> tuple[float, float]:
    """The errors on the ranks of `pool`, and greedy tokens that must be the same."""
    actual, expected = pool.run(numbers, name, plan, options, ep_size)[0], numbers(name, None, options)
    error = errors(actual, expected)
    assert max(error) > GRADIENTS or torch.equal(actual.tokens, expected.tokens)
    return error


def made(name: str) -> PreTrainedModel:
    """The tiny model without memory."""
    return on_meta(name)


def ours(name: str, size: int = 2) -> list[Rule]:
    """The rules that shardwise adds for a type."""
    return [rule for rule in model_rules(on_meta(name), size) if rule.source == "shardwise"]


def own(name: str) -> dict[str, str]:
    """The plan that transformers has for a type."""
    return dict(on_meta(name)._tp_plan)


@pytest.mark.parametrize("name", ALONE)
def test_corrections_fit(name):
    """Guards: a correction for a name that the model does not have (a typo, or a release that renamed it)."""
    model = on_meta(name)
    names = [n for n, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())]
    assert [str(rule) for rule in ours(name) if not any(map(rule.matches, names))] == []
    assert all(rule.reason for rule in ours(name))


@pytest.mark.parametrize("name", ALONE)
def test_corrections_are_needed(name):
    """Guards: a correction that says what transformers' plan says by now."""
    plan = own(name)
    assert [str(rule) for rule in ours(name) if plan.get(rule.pattern) == rule.style and rule.cut is None] == []


@pytest.mark.parametrize("name", sorted({*CORRECTIONS, *SORTED_EXPERTS}))
def test_transformers_plan_is_the_one_that_we_correct(name):
    """Guards: a plan that was changed under our corrections of it, which may have become wrong or needless. Look at them again,
    then write the new plan into `own_plans.json`.
    """
    config = CONFIG_MAPPING[name]
    found = {"tp": config.base_model_tp_plan, "ep": config.base_model_ep_plan}
    assert json.loads(OWN_PLANS.read_text())[name] == found


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("apertus", {"layers.*.mlp.act_fn": "replicate"}),
        ("gemma3n_text", {"layers.*.mlp": "local_params"}),
        ("qwen3_5_text", {"layers.*.linear_attn.norm": "replicate"}),
        ("inkling_text", {"layers.*.mlp.experts.gate_up_proj": "colwise"}),
        ("inkling2_text", {"layers.*.mlp.experts.gate_up_proj": "colwise"}),
        ("inkling_text", {"layers.*.mlp.shared_experts": "all_reduce"}),
        ("inkling_text", {"embed_tokens.embed_norm": "replicate"}),
        ("qwen3", {"layers.*.self_attn.q_norm": "replicate"}),
    ],
)
def test_without_the_correction_the_numbers_are_wrong(name, plan, pool2):
    """Guards: checks that would not see what the corrections are for."""
    assert max(compare(pool2, name, plan)) > 10 * GRADIENTS


def test_without_the_correction_doge_fails(pool2):
    """Guards: as above; here the mask of all KV heads meets the local queries."""
    with pytest.raises(RankError, match="must match the size"):
        pool2.run(numbers, "doge", {"layers.*.self_attn.dt_proj": "rowwise", "layers.*.self_attn.A": "replicate"}, {})


@pytest.mark.parametrize(
    ("name", "options"),
    [("cohere", {"use_qk_norm": True}), ("glm4_moe", {"use_qk_norm": True}), ("phi", {"qk_layernorm": True})],
)
def test_norms_that_an_option_switches_on(name, options, pool2, pool4):
    """Guards: q and k norms that the plan does not know: a gradient of the local heads only; a row a head."""
    for pool in (pool2, pool4):
        logits, gradient = compare(pool, name, {}, **options)
        assert logits < LOGITS
        assert gradient < GRADIENTS


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt_bigcode", {"multi_query": False}),
        ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
        ("falcon", {"new_decoder_architecture": False, "multi_query": True, "num_attention_heads": 5, "hidden_size": 80}),
        ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 8}),
        ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 8, "alibi": True}),
        ("falcon", {"new_decoder_architecture": False, "multi_query": True, "alibi": True, "attn_implementation": "eager"}),
        ("falcon", {"num_attention_heads": 6, "num_kv_heads": 3, "hidden_size": 96, "alibi": True}),
        ("falcon", {"bias": True}),
        ("bloom", {"num_attention_heads": 5, "hidden_size": 80}),
        ("bloom", {"pretraining_tp": 2, "slow_but_exact": True}),
        ("mpt", {"num_attention_heads": 5, "hidden_size": 80, "attn_config": {"clip_qkv": 0.5}}),
        ("stablelm", {"qk_layernorm": True}),
        ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ],
)
def test_options_that_lay_out_attention_otherwise(name, options, pool2):
    """Guards: fused q, k and v that are cut as another option of the config lays them out; biases and norms of all heads that
    meet local ones.
    """
    logits, gradient = compare(pool2, name, {}, **options)
    assert logits < LOGITS
    assert gradient < GRADIENTS


def test_pairs_of_heads_that_are_too_few(pool4):
    """Guards: DiffLlama's four heads, which are two pairs, on four ranks."""
    logits, gradient = compare(pool4, "diffllama", {}, num_attention_heads=4, num_key_value_heads=2)
    assert logits < LOGITS
    assert gradient < GRADIENTS


def test_heads_that_cannot_be_dealt_are_refused():
    """Guards: fused attention of 6 query heads and 1 KV head that is cut inside a head on 4 ranks."""
    with pytest.raises(PlanError, match=r"6 query heads and 1 KV heads cannot be split over tp=4"):
        shardwise.plan(on_meta("gpt_bigcode", n_head=6, num_attention_heads=6, hidden_size=96), 4)


def test_norms_follow_the_projections():
    """Guards: a norm's gradient summed over ranks that each have all of it, because a user's rule keeps the projection whole;
    and a user's rule for the norm itself that is overruled.
    """
    norm = "model.layers.0.self_attn.q_norm.weight"
    attention = {f"layers.*.self_attn.{name}_proj": "replicate" for name in "qkvo"}
    assert shardwise.plan(on_meta("qwen3"), 2)[norm].partial
    assert not shardwise.plan(on_meta("qwen3"), 2, attention)[norm].partial
    assert not shardwise.plan(on_meta("qwen3"), 2, {"layers.*.self_attn.q_norm": "replicate"})[norm].partial


@pytest.mark.parametrize("size", [2, 4])
def test_a_norm_over_all_heads_sums_its_statistics(size):
    """Guards: statistics over a rank's heads in the place of those over all behind local ones, of a user's rules too; a weight
    that is not cut as the heads are, or, of a KV head that ranks share, not held by these.
    """
    user = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"} | {"layers.*.self_attn.o_proj": "rowwise"}
    for plan in (shardwise.plan(on_meta("olmo2"), size), shardwise.plan(on_meta("olmo2"), size, user)):
        styles = {row.name: row.style for row in plan.modules}
        for norm, projection in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
            place = "model.layers.0.self_attn."
            assert styles[place + norm] is ShardedNorm
            rows = [plan[f"{place}{one}.weight"] for one in (norm, projection)]
            pieces = [row.layout.pieces(row.shape, 1, size) for row in rows]
            assert pieces[0] == pieces[1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["nemotron_h", "llama", "inkling2_text"])
def test_the_vocabulary_is_cut(name, tied):
    """Guards: an embedding or a head that no rule names and every rank keeps; a tied head that takes the embedding's shard and
    does not gather its logits.
    """
    plan = shardwise.plan(on_meta(name, tie_word_embeddings=tied), 2)
    embedding = next(row for row in plan if "embed" in row.name and row.shape[0] == 127)
    assert embedding.sharded
    assert plan["lm_head.weight"].sharded
    assert any(module.name == "lm_head" for module in plan.modules)


@pytest.mark.parametrize("name", DEALT)
def test_corrected_models_with_experts_dealt_to_ranks(name, pool2):
    """Guards: a correction of how each expert is split that is kept when whole experts are dealt."""
    logits, gradient = compare(pool2, name, {}, ep_size=2)
    assert logits < LOGITS
    assert gradient < GRADIENTS


def test_layers_that_differ(pool2):
    """Guards: a config that gives each layer other heads, and refuses to say how many the model has."""
    logits, gradient = compare(pool2, "dots3_note_text", {})
    assert logits < LOGITS
    assert gradient < GRADIENTS


@pytest.mark.parametrize("name", sorted(TINY))
def test_little_stays_whole_without_a_word(name):
    """Guards: matrices that nothing names, in a type that we know."""
    model = on_meta(name)
    plan = shardwise.plan(model, 2)
    silent = [row for row in plan if row.rule is None and not row.sharded and not row.buffer and len(row.shape) > 1]
    assert sum(row.bytes for row in silent) < 0.1 * plan.full_bytes


@pytest.mark.parametrize(("width", "size"), [(80, 4), (12, 3)], ids=["aligned", "too narrow for that"])
def test_experts_of_uneven_width(width, size):
    """Guards: gate and up in turns that are dealt unlike the rows that read them, where the width is uneven: gpt-oss on 16."""
    model = build("gpt_oss", intermediate_size=width, num_attention_heads=6 if size == 3 else 4, num_key_value_heads=size)
    assert shardwise.prove(shardwise.plan(model, size), model)


@pytest.mark.parametrize("name", ["gpt2", "xglm"])
def test_attention_to_an_encoder(name):
    """Guards: an option that adds modules which no rule names: they would be refused, or run on all heads of their own."""
    model = build(name, add_cross_attention=True)
    plan = shardwise.plan(model, 2)
    crossed = [row for row in plan if "crossattention" in row.name or "encoder_attn." in row.name]
    assert crossed
    assert all(row.sharded for row in crossed if len(row.shape) == 2)
    assert shardwise.prove(plan, model)
