"""Rules of the user's that don't go together: refused on every rank, before a weight is read or a module changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import broken_styles
import shardwise
from llamas import IDS, llama
from shardwise.errors import PlanError, ShardwiseError
from shardwise.infer import prove_rules
from shardwise.layers import is_parallel

MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"
WRONG: dict[str, tuple[dict[str, str], str]] = {
    "half of a gated pair": ({"layers.*.mlp.gate_proj": "replicate"}, f"48.*24.*, in {MLP}\\."),
    "whole behind cut": ({"layers.*.mlp.down_proj": "replicate"}, f"24.*48.*, in {MLP}.down_proj\\."),
    "colwise behind colwise": ({"layers.*.self_attn.o_proj": "colwise"}, f", in {ATTENTION}.o_proj\\."),
    "rowwise of a whole input": ({"layers.*.self_attn.q_proj": "rowwise"}, f", in {ATTENTION}.q_proj\\."),
    "a weight whole, its module cut": ({"layers.*.self_attn.q_proj.weight": "replicate"}, f", in {ATTENTION}.o_proj\\."),
    "packed where nothing is": ({"layers.*.mlp.up_proj": "packed_colwise"}, rf"off by .* behind {MLP}.down_proj"),
    "summed where all is whole": ({"norm": "all_reduce"}, "off by .* behind model.norm"),
    "only gradients wrong": ({"layers.*.mlp": "replicate", "layers.0.mlp.up_proj": "colwise"}, "gradient of model.layers.0"),
}
RIGHT: list[dict[str, str]] = [{"layers.*.mlp": "replicate"}, {"layers.1.self_attn": "replicate"}, {"lm_head": "replicate"}]


def _refused(path: str) -> dict[str, str]:
    """What is said of each, by `parallelize` and by `from_pretrained`; no model is changed."""
    said = {}
    for name, (rules, _) in WRONG.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        with pytest.raises(PlanError) as caught:
            shardwise.parallelize(model, plan=rules)
        assert not any(map(is_parallel, model.modules()))
        with pytest.raises(PlanError, match=re.escape(str(caught.value).splitlines()[0])):
            shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan=rules)
        said[name] = str(caught.value)
    return said


def _accepted(path: str) -> list[torch.Tensor]:
    with torch.no_grad():
        return [shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan=rules)(IDS).logits for rules in RIGHT]


def test_rules_that_do_not_go_together(pool2, tmp_path: Path):
    """Guards: sizes that don't fit, found in the middle of the first forward; logits, or gradients alone, that are wrong and
    nobody is told; rules that are right and refused.
    """
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path)
    for said in pool2.run(_refused, str(tmp_path)):
        for name, (rules, found) in WRONG.items():
            assert re.search(found, said[name]), said[name]
            assert all(f": {style}" in said[name] for style in rules.values())
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    for logits in (one for rank in pool2.run(_accepted, str(tmp_path)) for one in rank):
        assert (logits - expected).abs().max() < 1e-5


def test_what_is_taken_as_it_is():
    """Guards: a plan, or a style of the user's, that can't be had against our judgement."""
    model = llama()
    table = shardwise.plan(model, 2, WRONG["whole behind cut"][0])
    with pytest.raises(PlanError):
        prove_rules(table, model)
    prove_rules(shardwise.plan(model, 2), model)
    assert shardwise.plan(model, 2, table) is table
    shardwise.register_style("not_summed", broken_styles.NotSummed)
    prove_rules(shardwise.plan(model, 2, {"layers.*.mlp.down_proj": "not_summed"}), model)


UNDER = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("around", UNDER)
def test_proofs_under_whatever_the_caller_is(around):
    """Guards: a right plan that is refused where it is asked for without gradients, or in autocast; a wrong one let through."""
    model = llama()
    right, wrong = (shardwise.plan(model, 2, rules) for rules in (RIGHT[0], WRONG["only gradients wrong"][0]))
    with UNDER[around]():
        prove_rules(right, model)
        assert shardwise.prove(right, model)
        assert shardwise.infer_plan(model, 2).size == 2
        with pytest.raises(PlanError, match="The plan is wrong"):
            prove_rules(wrong, model)


@pytest.mark.parametrize("given", ["llama", llama().config, None])
def test_what_is_no_model(given):
    """Guards: "'LlamaConfig' object has no attribute '_modules'"."""
    with pytest.raises(PlanError, match=r"(?s)a model is needed.*from_pretrained") as caught:
        shardwise.parallelize(given)
    assert type(given).__name__ in str(caught.value)


def test_parameters_for_a_model():
    """Guards: torch's own call, whose parameters don't say that they are parts: "'generator' object has no attribute"."""
    with pytest.raises(ShardwiseError, match="the model is needed, not generator"):
        shardwise.clip_grad_norm_(nn.Linear(2, 2).parameters(), 1.0)


def test_patterns_that_are_no_text():
    """Guards: "can only concatenate str"."""
    with pytest.raises(PlanError, match="3 is no pattern"):
        shardwise.plan(llama(), 2, {3: "colwise"})
