"""`tp_plan="auto"` of a model to which nobody has written a plan: inferred, said, and refused where it cuts too little."""

from __future__ import annotations

import logging

import pytest
from torch import nn

import shardwise
from shardwise import api, tiny
from shardwise.errors import PlanError
from shardwise.infer import unknown
from shardwise.tiny.sizes import NO_DROPOUT


@pytest.fixture(autouse=True)
def nothing_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no plan were kept of any type."""
    monkeypatch.setattr(api, "frozen_model_rules", lambda model, size: [])


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


def test_nothing_is_inferred_beside_rules(bert):
    """Guards: a dict of the user's that is dropped in favour of what is inferred; an inference for one rank."""
    with pytest.raises(PlanError, match="no rule names these matrices"):
        shardwise.plan(bert, 2, {"encoder.layer.*.intermediate.dense": "colwise"})
    assert not any(row.sharded for row in shardwise.plan(bert, 1))
