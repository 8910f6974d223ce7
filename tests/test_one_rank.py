"""One rank alone in a process, on the GPU where there is one: an axis of one rank, and one of eight without the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

import shardwise
from figures import gradient_error
from gpus import DEVICE, axis, pool
from gpus import one as one
from llamas import llama
from models import batches, checkpoint
from shardwise.hf import model_rules
from shardwise.mesh import local_device
from shardwise.model import ShardedModel
from shardwise.model_state import ModelState
from shardwise.parallelize import apply_plan
from shardwise.resolve import resolve
from shardwise.testing import RankPool
from shardwise.testing.fake import fake_rank

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(scope="module")
def alone() -> Iterator[RankPool]:
    """A process without a process group."""
    with pool(1, backend=None) as started:
        yield started


def one_rank_of_one(path: str) -> dict[str, object]:
    """The plain model and, on an axis of one rank, the parallel one: gradients, and tokens from a static cache.

    On a GPU transformers compiles decoding with a static cache by itself, in CUDA graphs.
    """
    plain, sharded = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(DEVICE) for _ in range(2))
    mesh = axis()
    table = resolve(sharded, model_rules(sharded, 1), 1)  # shardwise.plan has nothing to do for one rank
    apply_plan(sharded, ModelState(table, mesh, mesh), lambda row, tensor: tensor, ShardedModel.for_model(sharded))
    found: dict[str, object] = {
        "device": local_device(mesh).type,
        "layer": type(sharded.model.layers[0].self_attn.q_proj).__name__,
    }
    batch = batches(DEVICE)[0]
    for name, model in (("plain", plain), ("sharded", sharded)):
        batch.loss(model.train()).backward()
        found[f"{name} gradients"] = {key: p.grad for key, p in model.named_parameters()}
        prompt = {"attention_mask": batch.attention_mask, "max_new_tokens": 8, "do_sample": False}
        found[f"{name} tokens"] = model.eval().generate(batch.input_ids, cache_implementation="static", **prompt)
    return found


def test_a_model_on_an_axis_of_one_rank(one, tmp_path_factory):
    """Guards: layers whose collectives nccl, or a CUDA graph, does not take, where one GPU is all there is."""
    (found,) = one.run(one_rank_of_one, str(checkpoint(tmp_path_factory, "llama")))
    assert found["layer"] == "ColwiseLinear"
    assert torch.equal(found["sharded tokens"], found["plain tokens"])
    assert gradient_error(found["sharded gradients"], found["plain gradients"]) < 1e-3


def fake_step(compile_it: bool) -> dict[str, object]:
    """A training step of one rank of eight, whose collectives move nothing."""
    with fake_rank(8):
        mesh = axis()
        model = llama(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4).to(DEVICE)
        shardwise.parallelize(model, mesh)
        called = torch.compile(model, fullgraph=True) if compile_it else model
        ids = torch.arange(3, 63, device=DEVICE).view(2, 30)
        loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = shardwise.clip_grad_norm_(model, 1.0)
        weight = model.model.layers[0].self_attn.q_proj.weight
        return {
            "finite": bool(loss.isfinite() and norm.isfinite()),
            "shape": tuple(weight.grad.shape),
            "on": weight.device.type,
        }


@pytest.mark.parametrize("compile_it", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["eager", "compiled"])
def test_one_rank_of_eight_without_the_others(compile_it, alone):
    """Guards: a step that cannot be profiled on one GPU, as it waits for ranks or reads what they would have sent."""
    for found in alone.run(fake_step, compile_it):
        assert found == {"finite": True, "shape": (32, 256), "on": DEVICE}
