"""Whole models on GPUs: two ranks beside one process, everything on the device. `gpus` says where the ranks run.

The claims about parity are those of `test_parity`, with its tolerances: float32 products are in full precision here too (torch
switches TF32 on for nobody).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

import models
import shardwise
import test_compile
import test_dropout
from figures import (
    Rounded,
    gradient_error,
    load_sharded,
    measure_plain,
    measure_rounded,
    measure_rounded_sharded,
    measure_sharded,
)
from gpus import DEVICE, axis, compiles, needs_cuda
from gpus import one as one
from gpus import ranks as ranks
from llamas import IDS, llama
from models import batches
from shardwise import tiny
from shardwise.errors import MismatchError, MissingRankError
from shardwise.testing import RankError, RankPool
from test_parity import Case, distance
from test_parity import test_common_gradients_are_bit_equal as test_common_gradients_are_bit_equal
from test_parity import test_full_state_dict as test_full_state_dict
from test_parity import test_gradients as test_gradients
from test_parity import test_greedy_tokens as test_greedy_tokens
from test_parity import test_logits as test_logits
from test_parity import test_loss as test_loss
from test_parity import test_norm_and_clipping as test_norm_and_clipping
from test_parity import test_sampled_tokens as test_sampled_tokens
from test_parity import test_saved_files_are_those_loaded as test_saved_files_are_those_loaded

pytestmark = pytest.mark.gpu

MIB = 2**20
# By what is loaded with it: of both, and of the ranks alone.
CASES: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "llama": ("llama", {"attn_implementation": "sdpa"}, {}),
    "llama eager": ("llama", {"attn_implementation": "eager"}, {}),
    "qwen3": ("qwen3", {}, {}),
    "mixtral grouped": ("mixtral", {"experts_implementation": "grouped_mm"}, {}),
    "mixtral batched": ("mixtral", {"experts_implementation": "batched_mm"}, {}),
    "mixtral eager": ("mixtral", {"experts_implementation": "eager"}, {}),
    "mixtral dealt": ("mixtral", {}, {"ep_size": 2}),
    "mixtral travelling": ("mixtral", {}, {"ep_size": 2, "tp_plan": {"layers.*.mlp.experts": "ep_all_to_all_experts"}}),
    "gpt_oss": ("gpt_oss", {}, {}),
}


def checkpoint(factory: pytest.TempPathFactory, name: str) -> Path:
    """Of a tiny model of the type, written once."""
    path = factory.getbasetemp() / "checkpoints" / name
    if name in models.TYPES:
        return models.checkpoint(factory, name)
    if not path.exists():
        tiny.build(name).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def cases(ranks: RankPool, one: RankPool, tmp_path_factory) -> Callable[[str], Case]:
    """What the ranks and the one process found, once a case."""

    @cache
    def measured(case: str) -> Case:
        name, both, sharded = CASES[case]
        path, saved = checkpoint(tmp_path_factory, name), tmp_path_factory.mktemp("saved") / name
        (expected,) = one.run(measure_plain, path, DEVICE, **both)
        return Case(expected, ranks.run(measure_sharded, path, saved, **both, **sharded), path, saved)

    return measured


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, cases) -> Case:
    """Each of `CASES`."""
    return cases(request.param)


def rounded(path: Path, **overrides: object) -> tuple[Rounded, Rounded]:
    """One process: in float32 with the rounded weights, and in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **overrides).to(DEVICE)
    return measure_rounded(copy.deepcopy(model).float()), measure_rounded(model)


EVERY_EXPERT: dict[str, object] = {"num_experts_per_tok": 4}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("mixtral", {**EVERY_EXPERT, "experts_implementation": "grouped_mm"}),
        ("mixtral", {**EVERY_EXPERT, "experts_implementation": "batched_mm"}),
        ("gpt_oss", EVERY_EXPERT),
    ],
)
def test_bfloat16_is_as_close_as_one_process(name, overrides, ranks, one, tmp_path_factory):
    """Guards: a reduction in less precision than the activations have, or a cast before a sum."""
    path = checkpoint(tmp_path_factory, name)
    ((exact, plain),) = one.run(rounded, path, **overrides)
    sharded = ranks.run(measure_rounded_sharded, path, **overrides)
    for figures in sharded:
        assert torch.dist(figures.logits, exact.logits) < 1.5 * torch.dist(plain.logits, exact.logits)
    assert distance(sharded[0].gradients, exact.gradients) < 1.5 * distance(plain.gradients, exact.gradients)


def loaded(path: str) -> dict[str, object]:
    """Where the shards are, and the most memory of the device that loading them, and putting them together, took."""
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    with torch.device(DEVICE):  # as torch.set_default_device does
        model = shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    peak, held = torch.cuda.max_memory_allocated() - start, torch.cuda.memory_allocated() - start
    with torch.device(DEVICE):
        shardwise.full_state_dict(model)
    return {
        "devices": {tensor.device for tensor in tensors},
        "own": torch.device("cuda", dist.get_rank() % torch.cuda.device_count()),
        "held": held,
        "shards": sum(tensor.nbytes for tensor in tensors),
        "largest": max(tensor.nbytes for tensor in tensors),
        "loading": peak,
        "gathering": torch.cuda.max_memory_allocated() - start - held,
    }


@needs_cuda
def test_memory_of_the_device(ranks, tmp_path):
    """Guards: a rank that puts the whole checkpoint, or both ranks' shards, on a device; and one that puts full tensors
    together there, where there is no room for them. A MiB for what the allocator rounds up.
    """
    llama(hidden_size=1024, intermediate_size=2816, vocab_size=8000).save_pretrained(tmp_path)
    for found in ranks.run(loaded, str(tmp_path)):
        assert found["devices"] == {found["own"]}
        assert found["shards"] > 20 * MIB
        assert found["held"] <= found["shards"] + MIB
        assert found["loading"] <= found["shards"] + found["largest"] + MIB
        assert found["gathering"] <= found["largest"] + MIB


def generated(path: Path, tp: bool, **keywords: object) -> Tensor:
    """Greedy tokens of a padded prompt."""
    auto = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = load_sharded(path) if tp else auto.to(DEVICE)
    batch = batches(DEVICE)[1]
    return model.eval().generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=8, **keywords)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_static_cache(name, ranks, one, tmp_path_factory):
    """Guards: a cache of fixed size made for all heads, or on another device."""
    path, keywords = checkpoint(tmp_path_factory, name), {"do_sample": False, "disable_compile": True}
    (expected,) = one.run(generated, path, False, **keywords)
    for tokens in ranks.run(generated, path, True, cache_implementation="static", **keywords):
        assert torch.equal(tokens, expected)


@compiles
@pytest.mark.parametrize(("name", "backend"), [("llama", "inductor"), ("qwen3", "aot_eager"), ("mixtral", "aot_eager")])
def test_compiled_model_trains_and_evaluates_as_in_eager_mode(name, backend, ranks, tmp_path_factory):
    """Guards: what `test_compile` guards, in the code that inductor makes for a GPU."""
    path, overrides = checkpoint(tmp_path_factory, name), test_compile.OVERRIDES.get(name, {})
    eager = ranks.run(test_compile.run, path, None, **overrides)
    compiled = ranks.run(test_compile.run, path, backend, **overrides)
    for expected, actual in zip(eager, compiled, strict=True):
        torch.testing.assert_close(actual.losses, expected.losses, atol=1e-5, rtol=0)
        torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=0)
        assert actual.graphs == (1, 2)
    assert gradient_error(compiled[0].gradients, eager[0].gradients) < 1e-3


@pytest.mark.parametrize("config", [test_dropout.LLAMA, test_dropout.STARCODER], ids=["llama", "starcoder2"])
def test_masks_agree_where_they_must_and_differ_where_they_must(config, ranks):
    """Guards: the random state of the GPU left out, from which dropout draws there; see `test_dropout`."""
    expected = {"heads": False, "again": False}
    for found in ranks.run(test_dropout._masks, config, True):
        assert found == {name: expected.get(name, True) for name in found}


def test_recomputing_draws_the_same_masks(ranks):
    """Guards: gradients of other masks than the forward's, under activation checkpointing."""
    config, gradients = test_dropout.STARCODER, test_dropout._gradients
    for plain, recomputed in zip(ranks.run(gradients, config, ""), ranks.run(gradients, config, "not reentrant"), strict=True):
        assert gradient_error(recomputed, plain) < 1e-3


def parallelized(seeds: tuple[int, int]) -> Tensor:
    """Logits of a llama that was on the device before it became parallel."""
    torch.manual_seed(seeds[dist.get_rank()])
    model = shardwise.parallelize(llama().to(DEVICE), axis())
    with torch.no_grad():
        return model(IDS.to(DEVICE)).logits


def test_weights_that_differ_are_named(ranks):
    """Guards: a model of which half is another one, because each rank was seeded differently; a check that cannot read the
    bits of a tensor on a GPU, or finds a difference where there is none.
    """
    torch.manual_seed(0)
    expected = llama()(IDS).logits
    for logits in ranks.run(parallelized, (0, 0)):
        torch.testing.assert_close(logits, expected.detach(), atol=1e-4, rtol=0)
    with pytest.raises(RankError, match="holds other values") as caught:
        ranks.run(parallelized, (0, 1))
    assert isinstance(caught.value.__cause__, MismatchError)


def saved_on_one_rank(path: Path, folder: Path) -> str:
    """What the first rank is told, and that all can save afterwards."""
    model, said = load_sharded(path), ""
    if dist.get_rank() == 0:
        with pytest.raises(MissingRankError) as caught:
            model.save_pretrained(folder, timeout=1.0)
        said = str(caught.value)
    dist.barrier()
    model.save_pretrained(folder)
    return said


def test_saving_on_one_rank_only_raises(ranks, tmp_path_factory, tmp_path):
    """Guards: a save that hangs, with the device's collectives in flight."""
    said, _ = ranks.run(saved_on_one_rank, checkpoint(tmp_path_factory, "llama"), tmp_path)
    assert "rank 1 had not called it" in said
    assert (tmp_path / "model.safetensors").exists()
