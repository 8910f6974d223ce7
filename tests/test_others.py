"""Encoders, encoder-decoders, towers and decoders with other heads: exact on two ranks through any Auto class."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import shardwise
from parity import drafts, others, stand_ins, types
from parity.others import FAST, OTHERS
from parity.others_table import TITLE
from parity.suite import Suite
from parity.table import written
from shardwise.errors import PlanError
from shardwise.hf import sample_feeds

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Suite:
    """Checkpoints and plain models' figures, once a class. Their plans are made here, for both ranks."""
    return Suite(tmp_path_factory.mktemp("others"), others.build, others.subject, found_once=lambda name: True)


@pytest.mark.parametrize("name", FAST)
def test_exact(name, suite, shm2):
    """Guards: a head or a tower whose outputs, gradients (one or two micro-batches), tokens (greedy, and of two beams) or saved
    bytes are not one process's; a class that "auto" refuses.
    """
    outcome = suite.outcome(name, shm2)
    assert not isinstance(outcome, PlanError), outcome
    assert outcome.wrong == ()


def test_document():
    """Guards: docs/architectures.md out of date, or with something that is wrong; `make parity ARGS=others` writes it."""
    rows = written(DOCUMENT.read_text().split(f"\n## {TITLE}\n")[1])
    assert {kind: row[1].split(", ") for kind, row in rows.items()} == {
        kind: [task or "model" for task in other.tasks] for kind, other in OTHERS.items()
    }


@pytest.mark.parametrize(
    "name", ["videomae VideoClassification", "clap", "siglip2", "bros", "canine", "layoutlmv3 TokenClassification"]
)
def test_made_up_inputs(name):
    """Guards: a model of images, sounds, pages or characters that can't be tried out for want of inputs."""
    model = others.build(name)
    feeds = sample_feeds(model.eval())
    with torch.no_grad():
        assert all((feed(model) if callable(feed) else model(**feed)) is not None for feed in feeds)


KEYS_OF_OTHERS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}


@pytest.mark.parametrize(("size", "heads"), [(2, 1), (4, 2)])
def test_layers_that_read_the_keys_of_others(size, heads):
    """Guards: layers without keys of their own that repeat those of another layer as if it had all KV heads, where ranks share
    these.
    """
    model = types.build("gemma4_text", **KEYS_OF_OTHERS, num_key_value_heads=heads)
    assert shardwise.prove(shardwise.plan(model, size), model)


def test_a_head_that_is_read_by_rows(threads):
    """Guards: a drafter that takes rows of its head's weight past the module, where a rank has rows of other tokens."""
    ordered = {"use_ordered_embeddings": True, "num_centroids": 127, "centroid_intermediate_top_k": 16}
    with stand_ins.all_keys_shared():
        drafter, target = types.build("gemma4_assistant", **ordered), types.build("gemma4_text", **drafts.SHARING)
        drafter.masked_embedding.token_ordering.copy_(torch.arange(127).flip(0))
        copies = [(copy.deepcopy(drafter), copy.deepcopy(target)) for _ in range(2)]
        expected = _drafted(drafter, target)

        def on_rank() -> list[Tensor]:
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
            own, read = copies[mesh.get_local_rank()]
            return _drafted(shardwise.parallelize(own, mesh), shardwise.parallelize(read, mesh))

        for found in threads(on_rank, 2):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def _drafted(drafter: nn.Module, target: nn.Module) -> list[Tensor]:
    logits = drafter(**drafts.drafted(target)[0]).logits
    logits.square().mean().backward()
    return [logits.detach(), drafter.lm_head.weight.grad]


@pytest.mark.parametrize("name", ["longformer MaskedLM", "led Seq2SeqLM"])
def test_global_attention(name):
    """Guards: projections that only global attention reads, left whole beside local ones because no trial has called them."""
    model = others.build(name).eval()
    ids = torch.arange(3, 27).view(2, 12)
    first = torch.zeros_like(ids).index_fill(1, torch.tensor(0), 1)
    feed = {"input_ids": ids, "global_attention_mask": first}
    shardwise.prove(shardwise.plan(model, 2), model, [feed | {"decoder_input_ids": ids[:, :6]} if "Seq2Seq" in name else feed])
