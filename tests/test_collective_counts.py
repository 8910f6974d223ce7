"""How many collectives a model makes: four all-reduces for each decoder layer and training step, two for each layer and
token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

import shardwise
import shardwise.layers.region
from models import batches, config
from on_ranks import world
from shardwise.collectives import copy_to_tp

LAYERS = 3


@pytest.fixture(scope="module")
def counts(pool2) -> list[dict[str, Counter[str]]]:
    """Of a llama of three layers: what each of two ranks counted."""
    return pool2.run(count)


def count(shared_inputs: bool = True) -> dict[str, Counter[str]]:
    """On a rank: the collectives of a training step, of reading a prompt and of a token after it, as the profiler sees them.

    "patched" counts the calls of `dist.all_reduce` in another training step. Without `shared_inputs` every linear copies
    its input.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config("llama", num_hidden_layers=LAYERS))
    shardwise.parallelize(model, world("tp"))
    if not shared_inputs:
        with patch.object(shardwise.layers.region.Region, "enter", lambda self, x, mesh, training: copy_to_tp(x, mesh)):
            return {"training": events(lambda: train_step(model))}
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        train_step(model)
    found = {"training": events(lambda: train_step(model)), "patched": Counter(all_reduce=all_reduce.call_count)}
    model.eval()
    prompt, more = batches()[0].input_ids, batches()[0].input_ids[:, :1]
    with torch.no_grad():
        found["prompt"] = events(lambda: model(input_ids=prompt, use_cache=True))
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        found["token"] = events(lambda: model(input_ids=more, past_key_values=cache, use_cache=True))
    return found


def train_step(model: PreTrainedModel) -> None:
    """Forward and backward."""
    batches()[0].loss(model.train()).backward()


def events(call: Callable[[], object]) -> Counter[str]:
    """The collectives in a call, whoever makes them, and our autograd nodes, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    names = (event.name for event in seen.events())
    return Counter(name for name in names if name.startswith("c10d::") or name in ("CopyToTP", "ReduceFromTP", "GatherFromTP"))


def test_four_all_reduces_a_layer_and_step(counts):
    """Guards: a backward all-reduce for each of q, k, v, gate and up, where one for those that read the same input does
    (transformers and DTensor make seven a layer). The embedding and the head make one each.
    """
    for found in counts:
        assert found["training"]["c10d::allreduce_"] == 4 * LAYERS + 2
        assert found["patched"]["all_reduce"] == 4 * LAYERS + 2
        assert sum(n for name, n in found["training"].items() if name.startswith("c10d::")) == 4 * LAYERS + 3  # the logits


def test_a_copy_for_every_linear_would_be_seen(pool2):
    """Guards the test above: without sharing it is seven."""
    assert pool2.run(count, shared_inputs=False)[0]["training"]["c10d::allreduce_"] == 7 * LAYERS + 2


def test_collectives_are_named_in_a_trace(counts):
    """Guards: traces in which nobody can tell which all-reduce is which."""
    training = counts[0]["training"]
    assert (training["CopyToTP"], training["ReduceFromTP"], training["GatherFromTP"]) == (2 * LAYERS + 1, 2 * LAYERS + 1, 1)


@pytest.mark.parametrize("what", ["prompt", "token"])
def test_two_all_reduces_a_layer_and_token(counts, what):
    """Guards: synchronisation in decoding that nobody needs. The embedding makes one more, and the logits are gathered
    once; without gradient there is no autograd node.
    """
    for found in counts:
        assert found[what].pop("c10d::allreduce_") == 2 * LAYERS + 1
        assert found[what].total() == 1
        assert "gather" in next(iter(found[what]))
