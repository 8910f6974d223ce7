"""Plans that are kept: for all sizes of a type, for the options that they were proven with, as they would be made; and how
`auto` cuts every type.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import shardwise
from parity.stand_ins import NOT_BUILT
from shardwise import cli, tiny
from shardwise.freeze import NotBuilt, drift, freeze
from shardwise.freeze.express import Sample, express
from shardwise.hf import base_model
from shardwise.layers.registry import style_named
from shardwise.plan import Plan, expand
from shardwise.plans.frozen import FOLDER, Frozen, Variant, frozen, frozen_rules, members, other_option, problem
from shardwise.plans.frozen.expand import expand_rules, parts

KEPT = sorted(path.stem for path in FOLDER.glob("*.json"))
SAMPLE = ("bert", "gpt2", "gpt_bigcode", "gpt_oss")
OTHER = {
    "bert": {"hidden_size": 80, "num_attention_heads": 5, "intermediate_size": 112},
    "openai-gpt": {"hidden_size": 96, "num_attention_heads": 6},
    "modernbert-decoder": {"hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 56},
    "moshi": {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8, "ffn_dim": 72},
}
"""Sizes of a model that no plan was made from."""


def kept_variants(name: str) -> tuple[Variant, ...]:
    """Of the file of a type."""
    kept = frozen(name)
    assert kept is not None
    return kept.variants


def of_type(name: str, **options: object) -> nn.Module:
    """A tiny model on meta."""
    with torch.device("meta"):
        return tiny.empty(tiny.config(name, **options))


def sources(plan: Plan) -> set[str]:
    """Whose rules hold for the layers."""
    return {rule.source for name, rule in plan.rules.items() if "." in name and any(part.isdigit() for part in name.split("."))}


@pytest.mark.parametrize("name", SAMPLE)
def test_made_again_it_is_the_same(name):
    """Guards: a file that is edited by hand, or that would not be made any more: byte by byte."""
    made = freeze(name)
    assert made.to_json() == (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert Frozen.from_json(json.loads(made.to_json())) == made


@pytest.mark.parametrize("name", KEPT)
def test_files_are_as_they_are_read(name):
    """Guards: a slip of the pen in a file, which would be found when somebody has such a model; a type's size in a file that is
    for all of them; a file nobody can read.
    """
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    kept = frozen(name)
    assert kept is not None
    assert (kept.type, kept.to_json()) == (name, text)
    assert len(text) < 10_000
    assert kept.cut >= 0.5 or not kept.why
    for line in (line for variant in kept.variants for line in (*variant.rules, *variant.head)):
        assert style_named(line.style, line.pattern)
        assert line.reason or line.source == "model"
        assert all(parts(said) for said in (*line.attributes.values(), *line.parent_attributes.values()))
        assert expand(line.pattern) == [line.pattern]
        assert not any(map(str.isdigit, set(line.cut.replace("units of 16", "").removeprefix("dim 0: ")) - set("12348")))


@pytest.mark.parametrize("name", tiny.types())
def test_every_type_is_cut_as_its_file_says(name):
    """Guards: transformers or we cut a type in another way, and nobody has seen it in a review: then
    `shardwise freeze TYPE`, and look at what is different.
    """
    if name in NOT_BUILT:
        with pytest.raises(NotBuilt):
            drift(name)
    else:
        assert drift(name, inferred=False) is None


def with_rule(name: str, of: str, changed: dict[str, object]) -> Frozen:
    """The file of a type with one of its rules changed."""
    text = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    rules = text["variants"][0]["rules"]
    text["variants"][0]["rules"] = [rule | changed if rule["pattern"] == of else rule for rule in rules]
    assert rules != text["variants"][0]["rules"]
    return Frozen.from_json(text)


@pytest.mark.parametrize(
    ("name", "pattern", "changed", "said"),
    [
        ("gpt2", "h.*.attn.c_attn", {"parent_attributes": {}}, "transformer.h.0.attn is nothing by the file, and LocalParams"),
        ("llama", "layers.*.self_attn.k_proj", {"cut": "units of 1"}, "self_attn.k_proj.weight is (0,"),
        (
            "llama",
            "layers.*.mlp.down_proj",
            {"style": "replicate", "cut": ""},
            "mlp.down_proj.weight is None, False, tp by the file",
        ),
        (
            "llama",
            "layers.*.mlp.up_proj",
            {"cut": "config.nonsense units"},
            "nothing around it has a number called 'config.nonsense'",
        ),
        ("llama", "embed_tokens", {"pattern": "embed"}, "embed_tokens.weight is None"),
    ],
)
def test_drift_is_seen(monkeypatch, name, pattern, changed, said):
    """Guards: a comparison that finds everything alike."""
    monkeypatch.setattr("shardwise.freeze.compare.frozen", lambda name: with_rule(name, pattern, changed))
    assert said in (drift(name) or "")


def test_file_that_is_used_is_compared_with_what_is_inferred(monkeypatch):
    """Guards: a file of an inferred plan that inference would not make any more; one that is no longer used; one in the way."""
    assert drift("openai-gpt") is None
    model = of_type("openai-gpt")
    other = shardwise.plan(model, 2, {"h.*.mlp.c_fc": "colwise", "h.*.mlp.c_proj": "rowwise", "h.*.attn.c_attn": "replicate"})
    monkeypatch.setattr("shardwise.freeze.compare.infer_plan", lambda model, size: other)
    assert "attn.c_attn.weight is (1," in (drift("openai-gpt") or "")
    monkeypatch.setattr("shardwise.freeze.compare.make_plan", lambda model, size: other)
    assert drift("openai-gpt") == "auto no longer uses the file"
    monkeypatch.setattr("shardwise.freeze.compare.model_rules", lambda model, size: [1])
    assert drift("openai-gpt") == "it brings a plan by now, and the file's is used in its place"


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
    variant = kept_variants("falcon")[0]
    assert other_option(variant, base_model(of_type("falcon")).config) is None
    for multi_query in (True, False):
        other = base_model(of_type("falcon", new_decoder_architecture=False, multi_query=multi_query))
        assert (
            other_option(variant, other.config) == "new_decoder_architecture is false, and the frozen plan was proven with true"
        )
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

    samples = [Sample(Model(64, 4, 16, 4), "", None), Sample(Model(48, 12, 8, 6), "", None)]
    assert express(samples, [64, 96]) == "heads * width"
    assert express(samples, [4, 12]) == "heads"
    assert express(samples, [60, 36]) == "hidden - heads"
    assert express(samples, [7, 11]) is None
    assert express(samples, [4, 4]) is None


def test_number_that_stands_for_nothing_is_found_by_changing_it(monkeypatch):
    """Guards: the groups of a state-space mixer, which are 2 in a type's tiny model and in that of other sizes, as a 2."""
    monkeypatch.setattr("shardwise.freeze.recorded.other_options", lambda config: ())
    monkeypatch.setattr("shardwise.freeze.recorded.unrelated_sizes", lambda config, make: config)
    conv = next(line for line in freeze("mamba2").variants[0].rules if line.pattern.endswith("conv1d"))
    assert conv.cut == "n_groups x (intermediate_size / n_groups) | n_groups x ssm_state_size | n_groups x ssm_state_size"
    monkeypatch.setattr("shardwise.freeze.recorded.other_numbers", lambda config: ())
    by_accident = next(line for line in freeze("mamba2").variants[0].rules if line.pattern.endswith("conv1d"))
    assert by_accident.cut == "2 x hidden_size | 2 x 16 | 2 x 16"


def test_rule_for_one_kind_of_layer():
    """Guards: what is only right for some of a type's layers done in all of them, which have modules of the same name."""
    lines = {line.pattern: line for line in kept_variants("minimax")[0].rules}
    model = base_model(of_type("minimax"))
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name.endswith("self_attn")}
    assert len(set(kinds.values())) == 2
    line = lines["layers.*.self_attn"]
    assert members(model, line.pattern, line.of) == [
        name for name, kind in kinds.items() if kind == "MiniMaxLightningAttention"
    ]
    assert members(model, "layers.*.self_attn", "is_causal") == [
        n for n in kinds if getattr(model.get_submodule(n), "is_causal", 0)
    ]


def test_uneven_numbers_become_local():
    """Guards: a number that is divided by the ranks, where heads are dealt: 3 heads on two ranks."""
    model = base_model(of_type("openai-gpt", hidden_size=48, num_attention_heads=3))
    rules = expand_rules(frozen("openai-gpt").variants[0], model, "", 2)
    numbers = {name: values for rule in rules for name, values in rule.attributes.items()}
    assert numbers["split_size"] == (32, 16)


def test_command_writes_files_and_says_what_it_cannot(tmp_path: Path):
    """Guards: a type that is not frozen and nobody hears of it; a file in another place."""
    result = CliRunner().invoke(cli.app, ["freeze", "llama", "nonsense", "--folder", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "llama: 8 rules cut 100% of the model" in result.output
    assert "nonsense: not frozen: " in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["llama.json"]


def test_command_says_what_has_drifted(monkeypatch):
    """Guards: a check that finds drift and leaves with 0, or that counts a type that it could not look at."""
    run = partial(CliRunner().invoke, cli.app, env={"COLUMNS": "200"})
    fine = run(["freeze", "--check", "llama", "gemma4_assistant"])
    assert (fine.exit_code, fine.output.splitlines()[-1]) == (0, "1 of 1 types are cut as their files say.")
    assert "gemma4_assistant: not looked at: The set of layer types" in fine.output
    monkeypatch.setattr("shardwise.freeze.compare.frozen", lambda name: None)
    found = run(["freeze", "--check", "llama"])
    assert (found.exit_code, found.output.splitlines()[0]) == (1, "llama: it has no file")
    assert run(["freeze"]).exit_code == 2
