"""Plans that are inferred from what a model computes: on real ranks beside one process, and wrong plans refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from parity import types
from parity.suite import Suite
from shardwise.errors import PlanError
from shardwise.testing import RankPool
from shardwise.tiny.sizes import NO_DROPOUT

TYPES = ("llama", "gpt2", "gpt_neox", "bert", "mixtral", "phi3")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Tiny models of each type, loaded with inferred plans."""
    return Suite(Path(tmp_path_factory.mktemp("inferred")), build, plan="infer")


def build(name: str) -> PreTrainedModel:
    """The tiny model of a type, without dropout."""
    return types.build(name, **(NO_DROPOUT | {"is_decoder": True} if name == "bert" else {}))


@pytest.mark.parametrize("name", TYPES)
def test_inferred_plan_is_exact_on_two_ranks(name: str, suite: Suite, pool2: RankPool) -> None:
    """Guards: a plan that is right in the simulation alone; a head's number left as it was, which only decoding reads; ranks
    that infer different plans. Logits, losses, gradients after each of two micro-batches, tokens, saved bytes.
    """
    outcome = suite.outcome(name, pool2)
    assert not isinstance(outcome, PlanError), outcome
    assert outcome.wrong == ()
    assert outcome.share < 1.2
