"""`overlap=True` in whole models: what is communicated when, data parallelism around it, the keyword, and the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

import models
import shardwise
from blocks import ATTENTION_PLAN, Attention, Mlp, tp_axis, under
from models import batches, build, config
from on_ranks import world
from overlapped import MLP_PLAN
from shardwise.errors import PlanError
from shardwise.layers.overlap import OverlappedLinear
from shardwise.testing.delayed import DelayedGroup, delayed_mesh

# --- collectives ---


def steps_on_a_slow_network(asked: bool) -> tuple[list[str], list[str]]:
    """On a rank: the collectives of a llama's training step, and what happens in the backward of an attention."""
    torch.manual_seed(0)
    mesh = delayed_mesh()
    group = mesh.get_group()
    assert isinstance(group, DelayedGroup)
    model = AutoModelForCausalLM.from_config(config("llama"))
    model = shardwise.parallelize(model, mesh, overlap=asked)
    group.events = []
    batches()[0].loss(model).backward()
    calls = [event for event in group.events if event.startswith("start")]
    attention = nn.Sequential(Attention())
    attention = shardwise.parallelize(attention, mesh, plan=under("0", ATTENTION_PLAN), overlap=asked)
    for name, parameter in attention.named_parameters():
        parameter.register_hook(lambda grad, name=name: group.events.append(name))
    output = attention(torch.ones(1, 2, 12, requires_grad=True) * 1)
    group.events.clear()
    output.sum().backward()
    return calls, group.events


def test_weight_gradients_come_between_start_and_wait(pool2):
    """Guards: an all-reduce that is waited for at once, or started when the weight gradients are there; a bias or a sibling
    that comes too early or too late.
    """
    late = {f"0.{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias")}
    for _, events in pool2.run(steps_on_a_slow_network, True):
        end = len(events) - 1
        assert events[end] == "wait allreduce"
        assert events[end - 7] == "start allreduce"
        assert set(events[end - 6 : end]) == late
    for _, events in pool2.run(steps_on_a_slow_network, False):
        assert events[-2:] == ["start allreduce", "wait allreduce"]


def test_the_same_collectives(pool2):
    """Guards: a collective more, or in another order."""
    plain, overlapped = (pool2.run(steps_on_a_slow_network, asked)[0][0] for asked in (False, True))
    assert plain == overlapped
    assert plain.count("start allreduce") == 4 * config("llama").num_hidden_layers + 2


def only_what_is_asked_for(asked: bool) -> tuple[int, int]:
    """On a rank: the all-reduces for the gradient of a weight alone, and weight gradients for that of the input alone."""
    mesh = delayed_mesh()
    group = mesh.get_group()
    assert isinstance(group, DelayedGroup)
    torch.manual_seed(0)
    mlp = shardwise.parallelize(nn.Sequential(Mlp()), mesh, plan=under("0", MLP_PLAN), overlap=asked)
    leaf = torch.ones(2, 6, requires_grad=True)
    loss = mlp(leaf * 1).sum()
    group.events, hooks = [], []
    torch.autograd.grad(loss, mlp[0].up.weight, retain_graph=True)
    mlp[0].up.weight.register_hook(hooks.append)
    torch.autograd.grad(loss, leaf)
    return group.events.count("start allreduce"), len(hooks)


def test_nothing_is_computed_that_nobody_asked_for(pool2):
    """Guards: edges of the graph that the plain path has not: one from the input's copy to every sibling's weight would make
    an all-reduce where only a weight's gradient is wanted.
    """
    assert pool2.run(only_what_is_asked_for, True) == pool2.run(only_what_is_asked_for, False) == [(1, 0)] * 2


# --- whole models ---


def trained(name: str, asked: bool, wrap: str) -> dict[str, Tensor]:
    """On a rank: gradients of a model after two accumulated batches; `wrap` says what is around it."""
    torch.manual_seed(0)
    mesh = world("dp", "tp", shape=(2, 2)) if dist.get_world_size() == 4 else world("tp")
    model = shardwise.parallelize(build(name), mesh["tp"] if mesh.ndim == 2 else mesh, overlap=asked).train()
    if wrap == "ddp":
        _forget_a_sibling(model)
        called = DistributedDataParallel(model, process_group=mesh["dp"].get_group(), find_unused_parameters=True)
    elif wrap.startswith("fsdp"):
        called = _fsdp(model, mesh["dp"], wrap)
    else:
        called = torch.compile(model, fullgraph=True, backend="aot_eager") if wrap == "compile" else model
        if wrap == "checkpoint":
            model.gradient_checkpointing_enable({"use_reentrant": False})
    rank = mesh["dp"].get_local_rank() if mesh.ndim == 2 else 0
    for batch in batches()[:2]:
        ids = batch.input_ids.roll(rank, 1)
        called(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.to_local() if wrap.startswith("fsdp") else p.grad for name, p in model.named_parameters()}


def _forget_a_sibling(model: PreTrainedModel) -> None:
    """A projection that is never called: DDP has to find that it got no gradient."""
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)))


def _fsdp(model: PreTrainedModel, mesh: DeviceMesh, wrap: str) -> nn.Module:
    for layer in model.model.layers:
        if wrap == "fsdp of linears":
            for part in ("q_proj", "k_proj"):
                fully_shard(getattr(layer.self_attn, part), mesh=mesh)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("wrap", ["nothing", "checkpoint", "compile"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "mixtral", "deepseek_v3"])
def test_models(name, wrap, pool2):
    """Guards: a model whose layers share inputs in a way of its own, and its compiled graph."""
    if wrap == "compile" and name != "llama":
        pytest.skip("one type is enough: compiled code is as without")
    for plain, overlapped in zip(pool2.run(trained, name, False, wrap), pool2.run(trained, name, True, wrap), strict=True):
        torch.testing.assert_close(overlapped, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "fsdp of linears"])
def test_data_parallel(wrap, pool4):
    """Guards: gradients that reach DDP's or FSDP2's hooks too early, too late or not at all; a weight that FSDP2 has freed, or
    gathered only for the forward of another; a parameter that DDP thinks was used.
    """
    for plain, overlapped in zip(
        pool4.run(trained, "llama", False, wrap), pool4.run(trained, "llama", True, wrap), strict=True
    ):
        torch.testing.assert_close(overlapped, plain, rtol=1e-5, atol=1e-7)


# --- the model as an object ---


# --- the keyword ---


def loaded(path: str) -> list[int]:
    """On a rank: how many layers overlap in a model that was loaded, and in one that was made."""
    auto = shardwise.AutoModelForCausalLM
    found = (
        auto.from_pretrained(path, tp_plan="auto", overlap=True),
        auto.from_config(config("llama"), tp_size=2, overlap=True),
    )
    return [sum(isinstance(part, OverlappedLinear) for part in model.modules()) for model in found]


def test_the_keyword_of_from_pretrained(pool2, tmp_path_factory):
    """Guards: a keyword that is handed to transformers, or dropped."""
    path = models.checkpoint(tmp_path_factory, "llama")
    assert pool2.run(loaded, path) == [[5 * config("llama").num_hidden_layers + 1] * 2] * 2


def test_refusals(threads, tmp_path):
    """Guards: a keyword that does nothing, silently."""

    def ask(plan: dict[str, str], asked: object) -> str:
        with pytest.raises(PlanError) as error:
            shardwise.parallelize(nn.Sequential(nn.Linear(4, 4)), tp_axis(), plan=plan, overlap=asked)
        return str(error.value)

    assert "no column-wise linear layer" in threads(ask, 2, {"0": "rowwise_split_input"}, True)[0]
    assert "True or False" in threads(ask, 2, {"0": "colwise"}, "yes")[0]
    with pytest.raises(PlanError, match="needs tensor parallelism"):
        shardwise.AutoModelForCausalLM.from_pretrained(tmp_path, overlap=True)


# --- the network, and the benchmark on it ---


def on_a_slow_network() -> list[float]:
    """On a rank: seconds of an all-reduce, of one that is waited for later, and of what is then left to wait."""
    group = delayed_mesh(0.2).get_group()
    assert isinstance(group, DelayedGroup)
    found, x = [], torch.ones(3)
    start = time.monotonic()
    dist.all_reduce(x, group=group)
    found.append(time.monotonic() - start)
    work = dist.all_reduce(x, group=group, async_op=True)
    found.append(time.monotonic() - start - found[0])
    time.sleep(0.1)
    before = group.blocked
    work.wait()
    assert torch.equal(x, torch.full((3,), 4.0))
    return [*found, group.blocked - before]


def test_a_slow_network(pool2):
    """Guards: a delay that blocks who does not wait yet, or that starts when somebody waits."""
    for synchronous, started, left in pool2.run(on_a_slow_network):
        assert synchronous >= 0.2
        assert started < 0.15
        assert left < 0.15


def test_the_benchmark(tmp_path):
    """Guards: a benchmark that has rotted by the time that somebody repeats the figures."""
    command = [sys.executable, "-m", "benchmarks.overlap", "--tiny", "--rounds", "2", "--delays", "0", "3"]
    subprocess.run([*command, "--out", str(tmp_path / "it.json")], cwd=Path(__file__).parents[1], check=True, timeout=200)
    none, some = json.loads((tmp_path / "it.json").read_text())["rows"]
    assert none["plain_blocked"] < some["plain_blocked"] / 4
    assert some["overlapped_blocked"] < some["plain_blocked"]
    assert some["hideable_a_layer"] == 6
