"""Large models without their memory: planned and made parallel on meta, in work that follows the layers and not the ranks."""

from __future__ import annotations

import cProfile
import pstats
import tracemalloc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

import shardwise
from models import config as tiny
from shardwise.hf import build_on_meta
from shardwise.mesh import tp_mesh
from shardwise.model_state import required_state
from shardwise.testing.fake import fake_rank

MIB = 2**20
LLAMA_405B = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


class Allocated(TorchDispatchMode):
    """In the block: `bytes` of the tensors that any operation gave, those on meta left out."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.bytes += sum(t.nbytes for t in tree_leaves(result) if isinstance(t, Tensor) and not t.is_meta)
        return result


def calls(work: Callable[..., object], *args: object) -> int:
    """How many functions `work(*args)` calls: a measure of its time that no other process changes."""
    with cProfile.Profile() as seen:
        work(*args)
    return pstats.Stats(seen).total_calls


def on_meta(config: PreTrainedConfig, size: int, **options: int) -> nn.Module:
    """A model on meta, made parallel: one rank of `size`. Inside of `fake_rank`."""
    return shardwise.parallelize(build_on_meta(config), tp_mesh(size, **options), **options)


def test_a_405b_model_takes_no_memory():
    """Guards: a model built or cut on the CPU, which for this one would be 1.5 TB; a table that holds more than its rows.
    The tensors of this process, random states above all, are 40 KiB; tables and modules take 10 MiB, all of it Python's.
    """
    config = LlamaConfig(**LLAMA_405B)
    shardwise.plan(LlamaConfig(**{**LLAMA_405B, "num_hidden_layers": 1}), 8)  # imports are not counted
    tracemalloc.start()
    try:
        with Allocated() as real:
            plan = shardwise.plan(config, 8)
            with fake_rank(8):
                model = on_meta(config, 8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.full_bytes > 1500 * 1000**3
    assert sum(p.nbytes for p in model.parameters()) == pytest.approx(plan.full_bytes / 8, rel=0.01)
    assert real.bytes < MIB
    assert peak < 32 * MIB


def wide_llama(layers: int) -> LlamaConfig:
    """A head for each of 128 ranks, so that every size has the same rows."""
    heads = {"num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 8}
    return LlamaConfig(hidden_size=1024, intermediate_size=1024, vocab_size=1024, num_hidden_layers=layers, **heads)


def test_work_does_not_grow_with_the_ranks():
    """Guards: what every rank would hold, worked out anew for each module (with 128 ranks planning took 4 times as long as
    with 8, and so did making the model parallel). What is left is a look at each rank for each kind of tensor.
    """
    config = wide_llama(32)
    found: dict[str, dict[int, int]] = {"plan": {}, "print": {}, "parallelize": {}}
    for size in (8, 128):
        model = build_on_meta(config)
        plan = shardwise.plan(model, size)
        found["plan"][size], found["print"][size] = calls(shardwise.plan, model, size), calls(str, plan)
        with fake_rank(size):
            found["parallelize"][size] = calls(shardwise.parallelize, model, tp_mesh(size), plan)
    assert {what: counts[128] / counts[8] < 1.25 for what, counts in found.items()} == dict.fromkeys(found, True), found


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("llama", {"layers.*.mlp": "replicate"}),
        ("deepseek_v3", "auto"),
        ("kimi_linear", "auto"),  # rules of ours that name each layer: two kinds of attention under one name
    ],
)
def test_work_grows_with_the_layers_alone(kind, plan):
    """Guards: a walk over all layers for each layer, or for each rule where there is a rule a layer. Twice the layers are
    twice the work; then they were up to four times as much.
    """
    models = [build_on_meta(AutoConfig.for_model(kind, num_hidden_layers=layers)) for layers in (64, 128)]
    few, many = (calls(shardwise.plan, model, 2, plan) for model in models)
    assert many < 2.2 * few


@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [("llama", 2, {}), ("llama", 4, {}), ("mixtral", 2, {}), ("mixtral", 2, {"ep_size": 2}), ("deepseek_v3", 2, {})],
)
def test_meta_stays_meta_and_then_is_as_ever(kind, size, options):
    """Guards: an error, or memory, where a model on meta is made parallel; tensors or numbers of full sizes in it. Filled with
    a rank's shards it computes what that rank of the same model computes that was never on meta.
    """
    config = tiny(kind)
    with fake_rank(size, rank=1):
        model = on_meta(config, size, **options)
        state = required_state(model)
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert tuple(tensor.shape) == state.local_shape(state.plan[name]), name
        torch.manual_seed(0)
        usual = shardwise.parallelize(AutoModelForCausalLM.from_config(config), tp_mesh(size, **options), **options)
        model.to_empty(device="cpu")
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, tensor in (*usual.named_parameters(), *usual.named_buffers()):
                assert named[name].shape == tensor.shape
                named[name].copy_(tensor)
        ids = torch.arange(12).view(2, 6)
        with torch.no_grad():  # the base model: logits are gathered, from nobody here
            expected, found = (m.eval().base_model(input_ids=ids).last_hidden_state for m in (usual, model))
        assert str(model) == str(usual)
    assert torch.equal(found, expected)


def test_unparallelize_on_meta():
    """Guards: collectives on tensors without data."""
    with fake_rank(2):
        model = on_meta(tiny("llama"), 2)
        shardwise.unparallelize(model)
    ordinary = build_on_meta(tiny("llama"))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in ordinary.named_parameters()}
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_model_that_is_built_and_cut_under_meta():
    """Guards: what the ranks compare, made on meta because everything is under `torch.device("meta")`, and unreadable there."""
    with fake_rank(2), torch.device("meta"):
        model = shardwise.AutoModelForCausalLM.from_config(tiny("llama"), tp_plan="auto")
        assert model.model.layers[0].mlp.up_proj.weight.shape == (48, 64)
    assert {p.device.type for p in model.parameters()} == {"meta"}
