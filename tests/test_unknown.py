"""`tp_plan="auto"` of a model to which nobody has written a plan: inferred, said, and refused where it cuts too little."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from torch import nn

import shardwise
from shardwise import coverage, planning, tiny
from shardwise.errors import PlanError
from shardwise.infer import cut_share, unknown
from shardwise.spec import Rule
from shardwise.tiny.sizes import NO_DROPOUT


@pytest.fixture(autouse=True)
def nothing_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no plan were kept of any type."""
    monkeypatch.setattr(planning, "frozen_model_rules", lambda model, size: [])


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    """A type without a plan, in transformers and here."""
    return tiny.build("bert", is_decoder=True, **NO_DROPOUT)


def test_a_plan_is_inferred(bert, caplog):
    """Guards: a model without a plan that is refused, or that is cut by a guess without a word."""
    with caplog.at_level(logging.WARNING):
        plan = shardwise.plan(bert, 2)
    assert list(plan) == list(shardwise.infer_plan(bert, 2))
    assert "BertLMHeadModel brings no plan: one was inferred" in caplog.text
    assert "The plan cuts 98 % of the model" in caplog.text


def test_less_than_half_is_refused(bert, monkeypatch):
    """Guards: "auto" on many devices with most of the model on each; an error without the way out."""
    monkeypatch.setattr(unknown, "LEAST", 0.99)
    with pytest.raises(PlanError, match=r'(?s)which cuts 98% of it alone.*whole.*tp_plan="infer"'):
        shardwise.plan(bert, 2)
    assert shardwise.plan(bert, 2, "infer").size == 2


def rules(**styles: str) -> list[Rule]:
    """A plan for the first dense layers of BERT's MLPs alone, or with other styles."""
    return [Rule(f"bert.encoder.layer.*.{name.replace('_', '.')}", style, "model") for name, style in styles.items()]


def test_the_rest_of_a_plan_is_inferred(bert, monkeypatch, caplog):
    """Guards: a plan for a part of a model that is refused, or dropped where the rest is inferred."""
    own = rules(intermediate_dense="colwise", output_dense="rowwise")
    monkeypatch.setattr(planning, "model_rules", lambda *args, **keywords: own)
    with caplog.at_level(logging.WARNING):
        plan = shardwise.plan(bert, 2)
    sources = {row.name.removeprefix("bert.encoder.layer.1."): row.rule.source for row in plan if row.sharded}
    assert sources["intermediate.dense.weight"] == sources["output.dense.weight"] == "model"
    assert sources["attention.self.query.weight"] == "inferred"
    assert "that for bert.embeddings.word_embeddings.weight" in caplog.text
    assert [row.layout for row in plan] == [row.layout for row in shardwise.infer_plan(bert, 2)]
    assert plan.prove(bert)


def test_many_small_parts_are_inferred(bert, monkeypatch):
    """Guards: a model of which the rules name the smaller half, taken as it is since no family of the rest is large."""
    monkeypatch.setattr(coverage, "LARGE", 0.5)
    own = rules(intermediate_dense="colwise", output_dense="rowwise")
    monkeypatch.setattr(planning, "model_rules", lambda *args, **keywords: own)
    plan = shardwise.plan(bert, 2)
    assert cut_share(plan) > 0.9
    monkeypatch.setattr(unknown, "LEAST", 0.99)  # then it stays as it was
    assert {row.rule.source for row in shardwise.plan(bert, 2) if row.sharded} == {"model"}


def test_a_wrong_part_of_a_plan_is_not_taken(bert, monkeypatch, caplog):
    """Guards: rules of a model's own that are wrong for its options, beside which all that is inferred would fail, too."""
    monkeypatch.setattr(planning, "model_rules", lambda *args, **keywords: rules(intermediate_dense="colwise"))
    with caplog.at_level(logging.WARNING):
        plan = shardwise.plan(bert, 2)
    assert "which is wrong: another one was inferred" in caplog.text
    assert list(plan) == list(shardwise.infer_plan(bert, 2))


def test_a_model_that_does_not_run_is_refused(bert, monkeypatch):
    """Guards: an error of the model's own code, on inputs that nobody gave it, in the place of one that says what to do."""

    def fails(*args: object) -> object:
        raise ZeroDivisionError("in the model")

    monkeypatch.setattr(unknown, "infer", lambda *args, **keywords: fails())
    with pytest.raises(PlanError, match="inputs made up for it: ZeroDivisionError: in the model"):
        shardwise.plan(bert, 2)
    monkeypatch.setattr(planning, "model_rules", lambda *args, **keywords: rules(intermediate_dense="colwise"))
    with pytest.raises(PlanError, match=r"(?s)no rule names these matrices.*none for the rest can be inferred"):
        shardwise.plan(bert, 2)


def test_what_a_trial_said_is_not_compared():
    """Guards: ranks that refuse each other's plans, as one's trial failed first on the first of two ranks, the other's on the
    second: these hold slices of other lengths, and their errors name them.
    """
    found = [Rule("head", "replicate", "inferred", reason=f"expected size {size}") for size in (63, 64)]
    assert repr(found[0]) == repr(found[1])
    assert repr(found[0]) != repr(replace(found[0], style="colwise"))


def test_nothing_is_inferred_beside_rules(bert):
    """Guards: a dict of the user's that is dropped in favour of what is inferred; an inference for one rank."""
    with pytest.raises(PlanError, match="no rule names these matrices"):
        shardwise.plan(bert, 2, {"encoder.layer.*.intermediate.dense": "colwise"})
    assert not any(row.sharded for row in shardwise.plan(bert, 1))
