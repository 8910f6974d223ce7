"""Plans that are kept: for all sizes of a type, no other options than they were proven with, and as they would be made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import shardwise
from shardwise import cli, tiny
from shardwise.freeze import freeze
from shardwise.freeze.express import Sample, express
from shardwise.hf import base_model
from shardwise.layers.registry import style_named
from shardwise.plan import Plan, expand
from shardwise.plans.frozen import FOLDER, Frozen, frozen, frozen_rules, problem
from shardwise.plans.frozen.expand import expand_rules, parts

KEPT = sorted(path.stem for path in FOLDER.glob("*.json"))
SAMPLE = ("bert", "openai-gpt", "modernbert-decoder")
OTHER = {
    "bert": {"hidden_size": 80, "num_attention_heads": 5, "intermediate_size": 112},
    "openai-gpt": {"hidden_size": 96, "num_attention_heads": 6},
    "modernbert-decoder": {"hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 56},
    "moshi": {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8, "ffn_dim": 72},
}
"""Sizes of a model that no plan was made from."""


def of_type(name: str, **options: object) -> nn.Module:
    """A tiny model on meta."""
    with torch.device("meta"):
        return tiny.empty(tiny.config(name, **options))


def sources(plan: Plan) -> set[str]:
    """Whose rules hold for the layers."""
    return {rule.source for name, rule in plan.rules.items() if "." in name and any(part.isdigit() for part in name.split("."))}


@pytest.mark.parametrize("name", SAMPLE)
def test_made_again_it_is_the_same(name):
    """Guards: a file that is edited by hand, or that inference would not make any more."""
    made, kept = freeze(name), frozen(name)
    assert kept is not None
    assert (made.variants[0].rules, made.variants[0].modules) == (kept.variants[0].rules, kept.variants[0].modules)
    assert Frozen.from_json(json.loads(made.to_json())) == made
    assert (FOLDER / f"{name}.json").read_text() == kept.to_json()


@pytest.mark.parametrize("name", KEPT)
def test_files_are_as_auto_reads_them(name):
    """Guards: a slip of the pen in a file, which would be found when somebody has such a model."""
    kept = frozen(name)
    assert kept is not None
    assert kept.type == name
    assert kept.cut >= 0.5
    for line in kept.variants[0].rules:
        assert style_named(line.style, line.pattern)
        assert line.reason
        assert all(parts(text) for text in line.attributes.values())
        assert expand(line.pattern) == [line.pattern]
    assert not any(character.isdigit() and character not in "1234" for line in kept.variants[0].rules for character in line.cut)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", OTHER)
def test_right_for_sizes_it_was_not_made_from(name, size):
    """Guards: a number in a file that is right for one size alone."""
    model = of_type(name, **OTHER[name])
    plan = shardwise.plan(model, size)
    assert sources(plan) == {"frozen"}
    assert shardwise.prove(plan, model)
    assert "frozen: inferred and proven for this type" in str(plan)


def test_serves_every_head_of_a_type():
    """Guards: rules for the names of the causal LM alone."""
    from transformers import BertForSequenceClassification, BertModel

    config = tiny.config("bert")
    with torch.device("meta"):
        models = [BertModel(config), BertForSequenceClassification(config)]
    for model in models:
        plan = shardwise.plan(model, 2)
        assert sources(plan) == {"frozen"}
        assert shardwise.prove(plan, model)


def test_other_options_are_not_taken():
    """Guards: falcon's fused q, k and v, which lie in three ways under one name: a plan for one of them taken for another; and
    cross-attention that a plan says nothing of.
    """
    variant = freeze("falcon").variants[0]
    assert problem(variant, base_model(of_type("falcon"))) is None
    for options in (
        {"new_decoder_architecture": False, "multi_query": True},
        {"new_decoder_architecture": False, "multi_query": False},
    ):
        found = problem(variant, base_model(of_type("falcon", **options)))
        assert found is not None
        assert "new_decoder_architecture is false, and the frozen plan was proven with true" in found
    assert frozen_rules("bert", base_model(of_type("bert")), "bert.", 2)
    crossed = of_type("bert", is_decoder=True, add_cross_attention=True)
    assert frozen_rules("bert", base_model(crossed), "bert.", 2) == []


def test_another_class_or_matrix_in_the_layers_is_not_taken():
    """Guards: a model of somebody's own under a known type's name."""
    model = of_type("bert")
    variant = frozen("bert").variants[0]
    layer = model.bert.encoder.layer[1]
    layer.attention.gate = nn.Linear(64, 64, device="meta")
    assert problem(variant, base_model(model)) == "encoder.layer.*.attention.gate.weight was not there"
    del layer.attention.gate
    layer.attention.self.__class__ = type("Other", (type(layer.attention.self),), {})
    assert "encoder.layer.*.attention.self is a BertSelfAttention, Other" in problem(variant, base_model(model))


def test_more_ranks_than_heads_are_inferred_anew():
    """Guards: an error of the frozen plan, for too many ranks, where another plan is possible."""
    model = of_type("bert", intermediate_size=512)
    assert frozen_rules("bert", base_model(model), "bert.", 8)
    plan = shardwise.plan(model, 8)
    assert sources(plan) == {"inferred"}


def test_equal_by_accident_is_not_taken():
    """Guards: 64 = hidden size = 4 x 16 = 4 heads of 16, of which a file keeps the wrong one."""

    class Model(nn.Module):
        def __init__(self, hidden: int, heads: int, width: int, groups: int) -> None:
            super().__init__()
            self.hidden, self.heads, self.width, self.groups = hidden, heads, width, groups

    tiny_model, other = Model(64, 4, 16, 4), Model(48, 12, 8, 6)
    assert express([Sample(tiny_model, "", None, 64), Sample(other, "", None, 96)]) == "heads * width"
    assert express([Sample(tiny_model, "", None, 4), Sample(other, "", None, 12)]) == "heads"
    assert express([Sample(tiny_model, "", None, 7), Sample(other, "", None, 11)]) is None
    assert express([Sample(tiny_model, "", None, 4), Sample(other, "", None, 4)]) is None


def test_uneven_numbers_become_local():
    """Guards: a number that is divided by the ranks, where heads are dealt: 3 heads on two ranks."""
    model = base_model(of_type("openai-gpt", hidden_size=48, num_attention_heads=3))
    rules = expand_rules(frozen("openai-gpt").variants[0], model, "", 2)
    numbers = {name: values for rule in rules for name, values in rule.attributes.items()}
    assert numbers["split_size"] == (32, 16)


def test_command_writes_files_and_says_what_it_cannot(tmp_path: Path):
    """Guards: a type that is not frozen and nobody hears of it; a file in another place."""
    result = CliRunner().invoke(cli.app, ["freeze", "bert", "nonsense", "--folder", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "bert: 6 rules cut 98% of the model" in result.output
    assert "nonsense: not frozen: " in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["bert.json"]
