"""`shardwise.estimate`: beside the memory and the collectives of a real rank, and where it can't be made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.llama import modeling_llama

import shardwise
from models import TYPES, config
from shardwise import Estimate, tiny
from shardwise.errors import MeshError, PlanError, ShardwiseError, SimulationError
from shardwise.hf import checkpoint_activations
from shardwise.testing.fake import fake_rank

TP, BATCH, SEQUENCE = 2, 2, 192
WITHIN = 0.15


def longer(name: str, **options: object) -> PreTrainedConfig:
    """The config of a test model, for sequences of which the activations take a few MiB."""
    return config(name, **{"max_position_embeddings": SEQUENCE, "vocab_size": 512, **options})


def estimated(name: str, **options: object) -> Estimate:
    """Of that model on CPUs, the device of `Rank`."""
    return shardwise.estimate(longer(name), TP, batch=BATCH, sequence=SEQUENCE, device="cpu", **options)


class Rank:
    """The first of two ranks with real memory and real kernels; its collectives return at once, with values of no meaning."""

    def __init__(self, name: str, **options: object) -> None:
        self.model: nn.Module = AutoModelForCausalLM.from_config(longer(name)).train()
        assert dist.group.WORLD is not None
        shardwise.parallelize(self.model, DeviceMesh.from_group(dist.group.WORLD, "cpu", mesh_dim_names=("tp",)), **options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.ids = torch.randint(3, 127, (BATCH, SEQUENCE))
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self) -> None:
        """Forward and backward."""
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()

    def held(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))

    def states(self) -> int:
        """Bytes of the optimizer's states."""
        return sum(value.nbytes for state in self.optimizer.state.values() for value in state.values())


def most(work, folder: Path) -> int:
    """By how many bytes the memory of torch's CPU allocator grows at most in `work`: its own records, as the profiler keeps
    them, of kernels' buffers too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    found.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted(((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"), key=lambda change: change[0])
    assert changes
    return int(np.cumsum([size for _, size in changes]).max())


@pytest.mark.parametrize("name", TYPES)
def test_memory_is_that_of_a_real_rank(name, tmp_path):
    """Guards: activations that are not counted, or counted twice; logits that a loop lets go of; attention masks that a real
    step does not make; the optimizer's states, or what it takes while it steps, left out.

    What a kernel takes for itself is not seen, which 15 % have room for; any of these defects is more.
    """
    found = estimated(name)
    with fake_rank(TP):
        rank = Rank(name)
        grown = most(rank.backward, tmp_path)
        stepped = most(rank.optimizer.step, tmp_path)
        held, states = rank.held(), rank.states()
        gradients = sum(p.grad.nbytes for p in rank.model.parameters() if p.grad is not None)
    assert grown > 2 * 2**20
    assert found.parameters == held == found.plan.local_bytes(0)
    assert found.gradients == gradients
    assert found.optimizer == states
    assert found.activations == pytest.approx(grown, rel=WITHIN)
    assert found.peak == pytest.approx(held + states + max(grown, gradients + stepped), rel=WITHIN)
    assert found.peak_in == "backward"


def test_the_tolerance_bites(tmp_path):
    """Guards: a tolerance in which a step without its activations' second half, or with the whole model's, would fit."""
    whole = shardwise.estimate(longer("llama"), 1, batch=BATCH, sequence=SEQUENCE, device="cpu")
    assert whole.activations > (1 + WITHIN) * estimated("llama").activations


@pytest.mark.parametrize("option", ["checkpointing", "sequence_parallel"])
def test_memory_with_options(option, tmp_path):
    """Guards: an option that the simulation does not hand on: both take less than the plain step."""
    found, plain = estimated("llama", **{option: True}), estimated("llama")
    with fake_rank(TP):
        rank = Rank("llama", **({} if option == "checkpointing" else {option: True}))
        if option == "checkpointing":
            checkpoint_activations(rank.model)
        grown = most(rank.backward, tmp_path)
    assert found.activations == pytest.approx(grown, rel=WITHIN)
    assert found.activations < 0.95 * plain.activations


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3"])
def test_collectives_are_those_of_a_real_rank(name):
    """Guards: collectives of a simulated step that no rank makes, or in another order; modules or bytes that are not theirs."""
    found = estimated(name)
    with fake_rank(TP):
        rank = Rank(name)
        with shardwise.trace_collectives() as trace:
            rank.backward()
    assert [one.what for one in found.collectives] == [one.what for one in trace]
    assert found.put_in == trace.bytes


def test_collectives_by_kind_of_layer():
    """Guards: layers of two kinds shown as one, or bytes of a step that are not what its layers make together."""
    found = estimated("deepseek_v3")  # the first layer is dense, the second has experts
    assert [kind.layers for kind in found.kinds] == [("model.layers.0",), ("model.layers.1",), ("",)]
    assert sum(kind.bytes * len(kind.layers) for kind in found.kinds) == found.put_in
    llama = estimated("llama")
    assert [(kind.title, len(kind.collectives)) for kind in llama.kinds] == [
        ("model.layers.*  x 2", 4),
        ("outside of the layers", 3),
    ]
    forward = [one for one in llama.collectives if one.phase == "forward" and one.op == "all_reduce"]
    assert {one.bytes for one in forward} == {BATCH * SEQUENCE * 64 * 4}
    assert llama.sent < llama.put_in + BATCH * SEQUENCE * 512 * 4  # two ranks send what they put in, a gather the others' too


def test_prefill():
    """Guards: a KV cache of all heads, or of one layer; gradients or optimizer states in inference."""
    found = estimated("llama", training=False)
    heads, head, layers, tensors, width = 1, 8, 2, 2, 4
    assert found.cache == BATCH * SEQUENCE * heads * head * layers * tensors * width
    assert (found.gradients, found.optimizer, found.peak_in) == (0, 0, "forward")
    assert found.peak == found.parameters + found.cache + found.activations
    assert {one.phase for one in found.collectives} == {"forward"}


def test_dtype_and_optimizer():
    """Guards: a dtype that only some of it takes; an optimizer whose states are another's."""
    half, full = estimated("llama", dtype=torch.bfloat16), estimated("llama")
    assert half.gradients * 2 == full.gradients
    assert half.activations < 0.9 * full.activations
    assert estimated("llama", optimizer="sgd").optimizer == 0
    assert full.optimizer > 2 * full.gradients


def test_cuda_keeps_no_scores():
    """Guards: kernels of this machine's CPU where those of a GPU were asked for: with values of another width than keys, as
    DeepSeek has them, torch keeps all scores on a CPU and none on CUDA.
    """
    cuda = shardwise.estimate(longer("deepseek_v3"), TP, batch=BATCH, sequence=SEQUENCE, device="cuda")
    cpu = estimated("deepseek_v3")
    heads, layers, width = 4, 2, 4
    assert cpu.activations - cuda.activations > heads * layers * width * BATCH * SEQUENCE**2 / 2
    assert "efficient kernel" in str(cuda)
    assert "scores of all pairs" in str(cpu)


def test_experts_dealt_to_replicas():
    """Guards: tokens that travel to a number of ranks other than `ep_size`, or rows that are lost on fake tensors."""
    found = shardwise.estimate(longer("mixtral"), 2, ep_size=4, batch=BATCH, sequence=SEQUENCE)
    exchanged = [one for one in found.collectives if one.op == "all_to_all" and one.dtype == "float32"]
    rows = BATCH * SEQUENCE // 2 * 2  # half of the tokens are this rank's, each for two experts
    assert {one.shape for one in exchanged} == {(rows, 64)}
    assert {len(one.ranks) for one in exchanged} == {4}


def _estimates_here() -> None:
    shardwise.estimate(config("llama"), 2)


def test_a_process_group_is_left_alone(threads):
    """Guards: a simulation inside of a job that ends, or takes, the job's own process group."""
    with fake_rank(2):
        with pytest.raises(MeshError, match="one of several already"):
            _estimates_here()
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_nothing_is_left_behind(monkeypatch):
    """Guards: a random state that a simulation moves on; a group that it leaves when the plan can't be."""
    before, plain = torch.get_rng_state(), modeling_llama.LlamaMLP.forward

    def seeds(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(11)
        return plain(self, x)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", seeds)
    estimated("llama")
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(PlanError, match="tp=3"):
        shardwise.estimate(config("llama"), 3)
    assert not dist.is_initialized()


class _AsksForValues(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if hidden.sum().item() > 0 else hidden * 2


def test_what_cannot_be_simulated(monkeypatch):
    """Guards: a traceback of torch's where a model's code asks for values; a message that does not say where."""
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: self.down_proj(_AsksForValues()(self.up_proj(x))))
    with pytest.raises(SimulationError, match=r"LlamaForCausalLM: a step can't be simulated(.|\n)*modeling_llama\.py, line"):
        estimated("llama")
    assert not dist.is_initialized()


def test_what_is_asked_for():
    """Guards: sizes and names that are nonsense, found out by torch, or not at all."""
    for wrong in ({"batch": 0}, {"sequence": -1}, {"optimizer": "lion"}, {"device": "tpu"}):
        with pytest.raises(ShardwiseError, match=next(iter(wrong))):
            shardwise.estimate(config("llama"), 2, **wrong)


@pytest.mark.parametrize("shown", [str, Estimate.to_html])
def test_what_is_shown(shown):
    """Guards: a report without memory by kind, collectives, rules, or the step that it is about."""
    found = estimated("mixtral")
    text = shown(found)
    for word in ("parameters", "gradients", "optimizer", "activations", "peak", f"{BATCH} x {SEQUENCE} tokens", "adamw"):
        assert word in text
    for word in ("all_reduce", "self_attn.o_proj", "backward", "mlp.experts.gate_up_proj", "packed_colwise", "forward"):
        assert word in text
    assert f"{found.peak / 2**20:,.2f} MiB" in text
    if shown is str:
        assert max(map(len, text.splitlines())) <= 128
    else:
        assert "<script" not in text
        assert "http" not in text.replace("http://www.w3.org", "")


@pytest.mark.parametrize("name", ["gpt2", "bloom", "qwen3_next", "gpt_oss", "gemma3n_text", "jamba"])
def test_other_types_are_simulated(name):
    """Guards: code of a type that breaks the simulation: own attention, states in its place, experts of another kind."""
    found = shardwise.estimate(tiny.config(name), 2, batch=2, sequence=16)
    assert found.peak > found.parameters
    assert found.collectives


def test_dropout_inside_of_a_region():
    """Guards: a random seed of ours that is read from a tensor without a value, where a model drops out elements."""
    rates = {"attn_pdrop": 0.1, "resid_pdrop": 0.1}
    dropped, plain = (shardwise.estimate(tiny.config("gpt2", **given), 2, batch=2, sequence=16) for given in (rates, {}))
    assert dropped.activations > plain.activations  # the masks
