"""`overlap=True`: the gradients, the collectives and the hooks of the plain path, and an all-reduce that runs meanwhile."""

from __future__ import annotations

import copy
import gc
import io
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

import models
import shardwise
from blocks import ATTENTION_PLAN, Attention, GatedMlp, Mlp, fails, randomize, tp_axis, under, x
from models import batches, build, config
from on_ranks import world
from shardwise.errors import PlanError
from shardwise.layers import overlap
from shardwise.layers.overlap import OverlappedLinear
from shardwise.testing.delayed import DelayedGroup, delayed_mesh

MLP_PLAN = {"up": "colwise", "down": "rowwise"}
GATED_PLAN = {"gate_up": "packed_colwise", "down": "rowwise"}
Use = Callable[[nn.Module], object]


def both_ways(module: nn.Module, plan: dict[str, str], use: Use, mesh: DeviceMesh | None = None) -> tuple[object, object]:
    """On a rank: what `use` gives for `module` under `plan`, without overlap and with it."""
    found = []
    for asked in (False, True):
        model = shardwise.parallelize(copy.deepcopy(module), mesh or tp_axis(), plan=plan, overlap=asked)
        assert any(isinstance(part, OverlappedLinear) for part in model.modules()) == asked
        torch.manual_seed(5)
        found.append(use(model))
    return found[0], found[1]


def same(threads: Callable[..., list], size: int, module: nn.Module, plan: dict[str, str], use: Use) -> None:
    """What `use` gives is the same, bit for bit, with overlap and without, on every rank."""
    for plain, overlapped in threads(both_ways, size, module, plan, use):
        equal(plain, overlapped)


def equal(a: object, b: object) -> None:
    """Bit for bit, None where the other is None."""
    torch.testing.assert_close(b, a, rtol=0, atol=0, allow_subclasses=False)


def given(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """What backward left: the gradients of parameters and inputs, without those that are None."""
    grads = {name: p.grad for name, p in model.named_parameters()} | {f"input {i}": t.grad for i, t in enumerate(inputs)}
    found = {name: grad for name, grad in grads.items() if grad is not None}
    assert all(found[name].dtype == p.dtype for name, p in model.named_parameters() if name in found)
    return found


def train(model: nn.Module, *data: Tensor, call: Use | None = None) -> dict[str, Tensor]:
    """The gradients of accumulated micro-batches."""
    leaves = [t.clone().requires_grad_() for t in data]
    for leaf in leaves:
        output = model(leaf * 1) if call is None else call(leaf * 1)
        (output.sin() * output).sum().backward()
    return given(model, *leaves)


# --- gradients ---


@pytest.mark.parametrize("accumulated", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradients_of_attention(threads, size, kv_heads, accumulated):
    """Guards: a weight gradient lost, counted twice with the next micro-batch, or computed from a sibling's; a sum over ranks
    left out of KV heads that ranks share (four ranks, two heads).
    """
    module = randomize(nn.Sequential(Attention(kv_heads=kv_heads)))
    data = [x(2, 5, 12) for _ in range(accumulated)]
    same(threads, size, module, under("0", ATTENTION_PLAN), partial(_train, data))


def _train(data: list[Tensor], model: nn.Module) -> dict[str, Tensor]:
    return train(model, *data)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 0, 6), (2, 3, 6), (2, 2, 3, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradients_of_layers(threads, kind, bias, shape):
    """Guards: the gradient of a transposed weight (GPT-2) left untransposed; a missing bias; inputs of other dims."""
    module = randomize(nn.Sequential(Mlp(kind=kind, bias=bias)))
    same(threads, 2, module, under("0", MLP_PLAN), partial(_train, [x(*shape)]))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradients_of_fused_layers(threads, kind):
    """Guards: styles that inherit from the column-wise one left out."""
    module = randomize(nn.Sequential(GatedMlp(kind=kind)))
    same(threads, 2, module, under("0", GATED_PLAN), partial(_train, [x(2, 3, 6)]))


def test_gathered_outputs(threads):
    """Guards: a layer without a region (a language model's head), whose copy nobody lets go of."""
    module = randomize(nn.Sequential(nn.Linear(6, 7)))

    def use(model: nn.Module) -> object:
        found = train(model, x(2, 6), x(2, 6))
        region = model[0]._tp.region
        assert region is None or (region._last is None and not region._late)
        return found

    same(threads, 2, module, {"0": "colwise_gather_output"}, use)


def test_a_wrong_gradient_would_be_seen(threads, monkeypatch):
    """Guards the tests above: with a weight gradient left out they fail."""
    module = randomize(nn.Sequential(Attention()))
    monkeypatch.setattr(overlap.WeightGradient, "backward", staticmethod(lambda ctx, token: (None,) * 4))
    fails(lambda: same(threads, 2, module, under("0", ATTENTION_PLAN), partial(_train, [x(2, 5, 12)])))


class Wide(nn.Module):
    """Two inputs, siblings that are called never, twice, or for nothing, and one with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 4) for _ in range(4))
        self.never, self.own = nn.Linear(6, 4), Own(6, 4)
        self.down = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., 6) -> the same."""
        y = x.cos()
        self.d(x)
        return self.down(self.a(x) * self.b(y) + self.a(y) + self.c(x) * self.c(x) + self.own(x))


class Own(nn.Linear):
    """A product that is more than torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """As a linear layer, scaled."""
        return 3 * super().forward(input)


WIDE_PLAN = dict.fromkeys(("a", "b", "c", "d", "never", "own"), "colwise") | {"down": "rowwise"}


def test_siblings_called_never_twice_or_for_nothing(threads):
    """Guards: a gradient of zero, where the plain path leaves None, for what was not called or not used; one of two products
    of the same layer lost; a layer's own forward passed by.
    """
    module = randomize(nn.Sequential(Wide()))
    plain, overlapped = threads(both_ways, 2, module, under("0", WIDE_PLAN), partial(_train, [x(2, 6), x(2, 6)]))[0]
    assert not plain.keys() & {"0.d.weight", "0.d.bias", "0.never.weight", "0.never.bias"}
    torch.testing.assert_close(overlapped, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [("q_proj.weight",), ("q_proj.weight", "k_proj.bias"), ("weight",), ("weight", "bias")])
def test_frozen_parameters(threads, frozen):
    """Guards: a gradient for what is frozen, and none for the bias beside it; a node for what has no gradient at all."""
    module = randomize(nn.Sequential(Attention()))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    same(threads, 2, module, under("0", ATTENTION_PLAN), partial(_train, [x(2, 5, 12)]))


def test_an_input_without_gradient(threads):
    """Guards: a first layer behind frozen embeddings, which has weight gradients and no all-reduce."""
    module, data = randomize(nn.Sequential(Mlp())), x(2, 6)

    def use(model: nn.Module) -> object:
        model(data).sum().backward()
        return given(model)

    same(threads, 2, module, under("0", MLP_PLAN), use)


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank addition, as PEFT wraps it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down, self.up = nn.Linear(12, 2, bias=False).double(), nn.Linear(2, base.out_features, bias=False).double()
        for weight in (self.down.weight, self.up.weight):  # ranks that are threads draw from one random stream
            nn.init.constant_(weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """As the base layer, and a bit more."""
        return self.base_layer(x) + self.up(self.down(x))


def test_an_adapter_around_a_layer(threads):
    """Guards: a wrapped layer that is no longer found among its siblings, and a gradient for its frozen weight."""
    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)

    def use(model: nn.Module) -> object:
        model[0].q_proj = Adapted(model[0].q_proj)
        return train(model, data)

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


def test_no_gradient_no_node(threads):
    """Guards: something kept, or computed otherwise, where nothing is trained."""
    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)

    def use(model: nn.Module) -> object:
        with torch.no_grad():
            output = model(data.requires_grad_())
        with torch.inference_mode():
            assert torch.equal(model(data), output)
        region = model[0].q_proj._tp.region
        assert output.grad_fn is None
        assert region._last is None
        assert not getattr(region, "_late", None)
        return output

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


# --- what else runs backward ---


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(threads, use_reentrant):
    """Guards: tensors saved otherwise when recomputed; a wait that never comes in the inner backward."""
    module, data = randomize(nn.Sequential(Attention())), [x(2, 5, 12), x(2, 5, 12)]

    def use(model: nn.Module) -> object:
        return train(model, *data, call=lambda t: checkpoint(model, t, use_reentrant=use_reentrant))

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)
    found = threads(both_ways, 2, module, under("0", ATTENTION_PLAN), use)[0][1]
    equal(found, threads(both_ways, 2, module, under("0", ATTENTION_PLAN), partial(_train, data))[0][1])


def test_double_backward(threads):
    """Guards: a gradient of a gradient that lacks what goes through a weight, or through the sum over ranks."""
    module, data = randomize(nn.Sequential(Attention(), Attention())), x(2, 5, 12)
    plan = under("0", ATTENTION_PLAN) | under("1", ATTENTION_PLAN)

    def use(model: nn.Module) -> object:
        leaf = data.clone().requires_grad_()
        wanted = [leaf, *model.parameters()]
        first = torch.autograd.grad(model(leaf).sin().sum(), wanted, create_graph=True)
        sum(grad.pow(2).sum() for grad in first).backward()
        return [grad.detach() for grad in first], given(model, leaf)

    for plain, overlapped in threads(both_ways, 2, module, plan, use):
        torch.testing.assert_close(overlapped, plain, rtol=1e-10, atol=1e-10)


def test_a_graph_used_twice(threads):
    """Guards: what the first backward left over, added to the second."""
    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)

    def use(model: nn.Module) -> object:
        leaf = data.clone().requires_grad_()
        loss = model(leaf * 1).sin().sum()
        alone = torch.autograd.grad(loss, leaf, retain_graph=True)
        weight = torch.autograd.grad(loss, model[0].k_proj.weight, retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        return alone, weight, given(model, leaf)

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


def test_a_backward_that_failed(threads):
    """Guards: what a backward left that broke off, added to the next one."""
    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)

    def use(model: nn.Module) -> object:
        leaf = data.clone().requires_grad_()
        loss = model(leaf * 1).sin().sum()
        handle = model[0].v_proj.weight.register_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
        handle.remove()
        model.zero_grad()
        leaf.grad = None
        loss.backward()
        return given(model, leaf)

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


def _fail(grad: Tensor) -> Tensor:
    raise ZeroDivisionError


def test_hooks(threads):
    """Guards: a module's or a parameter's hook that is not called, or with other values."""
    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)

    def use(model: nn.Module) -> object:
        seen: list[Tensor] = []
        layer = model[0].k_proj
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layer.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        model[0].q_proj.register_full_backward_hook(lambda module, of_input, of_output: seen.append(of_input[0]))
        layer.weight.register_hook(lambda grad: seen.append(grad) or grad * 2)
        layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        return seen, train(model, data)

    # Around the threads, which would each restore what the other one set.
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly(check_nan=True):
        same(threads, 2, module, under("0", ATTENTION_PLAN), use)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast(threads, dtype):
    """Guards: a product in the weight's dtype, or a gradient in that of the product."""
    module, data = randomize(nn.Sequential(Attention())).to(dtype), x(2, 5, 12).to(dtype)

    def use(model: nn.Module) -> object:
        return train(model, data, call=torch.autocast("cpu", torch.bfloat16)(model))

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


def test_autocast_and_a_weight_that_is_read_again(threads):
    """Guards: a cast weight without a gradient, left in the cache of torch's older autocasts for the next who reads it. The
    plain path adds what the two give in bfloat16, so they differ by its noise; more than half of the gradient would be lost.
    """
    module, data = randomize(nn.Sequential(Mlp())).float(), x(4, 6).float()

    def use(model: nn.Module) -> object:
        leaf = data.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(leaf * 1).sum() + nn.functional.linear(leaf * 3, model[0].up.weight).sum()
        loss.backward()
        return given(model, leaf)

    for plain, overlapped in threads(both_ways, 2, module, under("0", MLP_PLAN), use):
        torch.testing.assert_close(overlapped, plain, rtol=0.05, atol=0.05)


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


def test_copies_and_pickles(threads):
    """Guards: a copy whose layers look for the original's siblings, or that overlaps no more."""
    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)

    def use(model: nn.Module) -> object:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        found = []
        for other in (copy.deepcopy(model), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)):
            late = [member() for member in getattr(other[0].q_proj._tp.region, "_members", [])]
            overlaps = isinstance(model[0].q_proj, OverlappedLinear)
            assert late == ([other[0].q_proj, other[0].k_proj, other[0].v_proj] if overlaps else [])
            found.append(train(other, data))
        return found, train(copy.deepcopy(model[0].q_proj), data), train(model, data)

    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


def test_a_model_is_freed_at_once(threads):
    """Guards: a cycle between a layer and its siblings, which keeps the memory of a model until Python looks for cycles."""
    module, data = nn.Sequential(Attention()), torch.ones(1, 2, 12)

    def use(model: nn.Module) -> object:
        parts = [weakref.ref(part) for part in model.modules() if isinstance(part, OverlappedLinear)]
        train(model, data)
        gc.disable()
        model._modules.clear()
        try:
            return [part() is None for part in parts]
        finally:
            gc.enable()

    for _, freed in threads(both_ways, 2, module, under("0", ATTENTION_PLAN), use):
        assert freed == [True] * 3


def test_the_way_back(threads):
    """Guards: a class, or a region, that stays."""

    def use(model: nn.Module) -> object:
        shardwise.unparallelize(model)
        assert type(model[0].q_proj) is nn.Linear
        assert "_tp" not in vars(model[0].q_proj)
        return train(model, data)

    module, data = randomize(nn.Sequential(Attention())), x(2, 5, 12)
    same(threads, 2, module, under("0", ATTENTION_PLAN), use)


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
