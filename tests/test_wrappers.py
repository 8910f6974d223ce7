"""Models with towers around a text model: the plan finds the text model, the towers stay whole by name, all is exact."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import shardwise
from parity import wrappers
from parity.suite import Suite
from parity.table import written
from parity.types import every
from parity.wrapper_table import ELSEWHERE, TITLE, size_of
from parity.wrappers import WRAPPERS
from shardwise import plans
from shardwise.errors import PlanError
from shardwise.hf import build_on_meta, model_rules
from shardwise.hf.towers import text_prefix
from shardwise.plans import CORRECTIONS
from shardwise.tiny.sizes import TINY

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Suite:
    """Checkpoints and plain models' figures, once a wrapper."""
    return Suite(tmp_path_factory.mktemp("wrappers"), wrappers.build, wrappers.subject)


@pytest.fixture(scope="module")
def document() -> dict[str, tuple[str, ...]]:
    """The rows of the wrappers in docs/architectures.md."""
    return written(DOCUMENT.read_text().split(f"\n## {TITLE}\n")[1])


@pytest.mark.parametrize("name", wrappers.names())
@pytest.mark.parametrize("size", [2, 4], ids=["tp2", "tp4"])
def test_exact(name, size, suite, shm2, shm4):
    """Guards: a wrapper whose text model is cut otherwise inside it than alone, features that some rank has other ones of, a
    tower's gradient that is a part on each rank, a checkpoint that lacks the tower.
    """
    outcome = suite.outcome(name, {2: shm2, 4: shm4}[size])
    assert not isinstance(outcome, PlanError), outcome
    assert outcome.wrong == ()


@pytest.mark.parametrize("name", wrappers.names())
def test_document(name, document):
    """Guards: docs/architectures.md out of date; `make parity` writes it."""
    assert name in document, "run `make parity`"
    assert document[name][4:6] == ("exact", "exact")
    assert document[name][-2:] == size_of(name).cells(), "run `make parity`"


def test_document_has_no_other_wrappers(document):
    """Guards: a type that is gone, or twice there, or said not to be there."""
    assert list(document) == list(wrappers.names())
    assert not ELSEWHERE.keys() & document.keys()


@pytest.mark.parametrize("name", wrappers.names())
def test_even_but_for_the_towers(name):
    """Guards: a default-size wrapper that is refused for its tower, or keeps more than it whole without a word."""
    found = size_of(name)
    assert found.unexplained == []
    assert not found.problem or "heads cannot be split" in found.problem


@pytest.mark.parametrize("name", wrappers.names())
def test_all_outside_is_named(name):
    """Guards: a tower, or a part of one, that stays whole without a rule that says so."""
    model = wrappers.build(name)
    prefix = text_prefix(model)
    assert prefix is not None
    outside = [row for row in shardwise.plan(model, 2) if not row.name.startswith(prefix) and not row.buffer]
    assert [row.name for row in outside if row.rule is None] == []


@pytest.mark.parametrize("name", [name for name, found in WRAPPERS.items() if found.reads != "text only"])
def test_the_tower_is_read(name, suite):
    """Guards: a check that never gets as far as the tower: the features change the logits, and the tower gets gradients."""
    model, (feed, _) = wrappers.build(name).eval(), wrappers.subject(name).feeds
    outside = [key for key in feed if key not in ("input_ids", "attention_mask", "labels") and feed[key].is_floating_point()]
    with torch.no_grad():
        logits = [model(**{**feed, **changed}).logits for changed in ({}, {key: feed[key].roll(1, -1) for key in outside})]
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("name", sorted(CORRECTIONS.keys() - TINY.keys() - set(every())))
def test_corrections_fit(name):
    """Guards: a correction of a text model or a tower that no wrapper here has, or for a name that it does not have."""
    wrapper = next(key for key, found in WRAPPERS.items() if name in (found.text, *(kind for kind, _ in found.towers.values())))
    model = wrappers.build(wrapper)
    names = [key for key, _ in (*model.named_modules(), *model.named_parameters())]
    rules = [rule for rule in model_rules(model, 2) if rule.source == "shardwise"]
    assert [rule.pattern for rule in rules if not any(map(rule.matches, names))] == []


@pytest.fixture
def llava() -> PreTrainedModel:
    """A tiny one, of which the tower is most."""
    return wrappers.build("llava")


def test_the_tower_stays_whole_by_name(llava):
    """Guards: a plan that is refused for what a wrapper has besides its text model, or does not say what it is."""
    plan = shardwise.plan(llava, 2)
    outside = [row for row in plan if not row.name.startswith(("model.language_model.", "lm_head")) and not row.buffer]
    assert {row.rule.source for row in outside} == {"shardwise"}
    reasons = {row.name.split(".")[1]: row.rule.reason for row in outside}
    assert "vision tower" in reasons["vision_tower"]
    assert "joins" in reasons["multi_modal_projector"]
    assert plan["model.language_model.layers.0.self_attn.q_proj.weight"].sharded
    assert "model.vision_tower.encoder.layers.*.mlp.fc1.weight" in str(plan)


def test_a_text_model_without_a_plan(monkeypatch):
    """Guards: a text model that every rank keeps whole because the tower is large and allowed to be whole: what the head's rule
    leaves is inferred, in the text model and in the tower.
    """
    monkeypatch.setattr(plans, "CORRECTIONS", {})
    tower = {"model_type": "clip_vision_model", **SMALL, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model(
        "llava", text_config={"model_type": "persimmon", "vocab_size": 512, **SMALL}, vision_config=tower
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    plan = shardwise.plan(model, 2)
    sources = {row.name: row.rule.source for row in plan if row.sharded}
    assert sources["model.language_model.layers.1.mlp.dense_h_to_4h.weight"] == "inferred"
    assert sources["model.vision_tower.encoder.layers.1.mlp.fc1.weight"] == "inferred"
    assert sources["lm_head.weight"] != "inferred"


def test_a_second_text_model_is_no_tower(llava):
    """Guards: a talker or a decoder beside the text model, with a vocabulary of its own, that goes as a tower."""
    with torch.device("meta"):
        llava.model.talker = AutoModelForCausalLM.from_config(AutoConfig.for_model("xlm", emb_dim=64, n_layers=2, n_heads=2))
    with pytest.raises(PlanError, match=r"(?s)no rule names these matrices.*model\.talker") as caught:
        shardwise.plan(llava, 2)
    assert "vision_tower" not in str(caught.value)


def test_a_head_beside_a_text_model_is_no_tower(caplog):
    """Guards: a model that is no wrapper: what no rule names in it is no tower, that stays whole, but inferred."""
    config = AutoConfig.for_model("llama", vocab_size=64, num_labels=4096, pad_token_id=0, **SMALL)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    with caplog.at_level(logging.WARNING):
        plan = shardwise.plan(model, 2)
    assert "that for score.weight was inferred, and proven" in caplog.text
    assert plan["score.weight"].rule.style == "colwise_gather_output"
    alone = shardwise.plan(model.model, 2)
    assert all(alone[row.name.removeprefix("model.")].layout == row.layout for row in plan if row.name.startswith("model."))


def test_a_rule_of_the_users_for_the_tower_holds(llava):
    """Guards: a style that the user gives a part of the tower, lost to our keeping its parameters whole."""
    rules = {f"vision_tower.encoder.layers.*.mlp.{child}": style for child, style in (("fc1", "colwise"), ("fc2", "rowwise"))}
    plan = shardwise.plan(llava, 2, rules)
    assert plan["model.vision_tower.encoder.layers.0.mlp.fc1.weight"].sharded
    assert plan["model.vision_tower.encoder.layers.1.mlp.fc2.weight"].sharded
    assert not plan["model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"].sharded


def test_a_rule_of_the_users_for_the_text_model(llava):
    """Guards: patterns as the text model's own plan has them, which a wrapper has one level further down."""
    plan = shardwise.plan(llava, 2, {f"layers.*.mlp.{child}_proj": "replicate" for child in ("gate", "up", "down")})
    assert not plan["model.language_model.layers.1.mlp.up_proj.weight"].sharded
    assert plan["model.language_model.layers.1.self_attn.q_proj.weight"].sharded


@pytest.mark.parametrize(("name", "kind"), [("llava", "LlavaForConditionalGeneration"), ("llama", "LlamaForCausalLM")])
def test_the_class_of_a_config(name, kind):
    """Guards: `shardwise plan` of a wrapper's config, for which there is no causal-LM class; a base model without its head."""
    assert type(build_on_meta(AutoConfig.for_model(name))).__name__ == kind


def test_the_class_that_the_config_names():
    """Guards: the plan of a causal LM shown for a checkpoint of the wrapper."""
    config = AutoConfig.for_model("llama4", architectures=["Llama4ForConditionalGeneration"])
    assert type(build_on_meta(config)).__name__ == "Llama4ForConditionalGeneration"


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
