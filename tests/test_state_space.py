"""State-space mixers on local channels or heads beside one process: training, decoding with their caches, fused kernels."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu, softplus
from transformers import DynamicCache, PreTrainedModel, StaticCache

import shardwise
from blocks import tp_axis
from shardwise import tiny

SMALL = {"hidden_size": 32, "vocab_size": 31, "num_hidden_layers": 1}
GRANITE = {"num_hidden_layers": 2, "num_local_experts": 0}
ZAMBA = {"num_hidden_layers": 2, "layers_block_type": ["hybrid"] * 2, "attention_head_dim": 8}
ZAMBA2 = {"num_hidden_layers": 2, "layers_block_type": ["hybrid"] * 2, "mamba_headdim": 8, "attention_head_dim": 16}
CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "mamba, uneven channels": ("mamba", {"intermediate_size": 54, "use_bias": True}),
    "falcon_mamba without a bias": ("falcon_mamba", {"use_conv_bias": False}),
    "jamba": ("jamba", {"num_hidden_layers": 2, "mamba_proj_bias": True}),
    "mamba2, a group": ("mamba2", {"n_groups": 1, "head_dim": 8, "use_bias": True}),
    "mamba2, two groups": ("mamba2", {"n_groups": 2, "head_dim": 8, "use_conv_bias": False}),
    "mamba2, a group and uneven heads": ("mamba2", {"n_groups": 1, "num_heads": 6, "head_dim": 8, "hidden_size": 24}),
    "mamba2, groups of uneven heads": ("mamba2", {"n_groups": 5, "num_heads": 10, "head_dim": 8, "hidden_size": 40}),
    "mamba2, what does not fit": ("mamba2", {"n_groups": 3, "num_heads": 6, "head_dim": 8, "hidden_size": 24}),
    "granitemoehybrid": ("granitemoehybrid", GRANITE | {"mamba_d_head": 8, "mamba_proj_bias": True}),
    "falcon_h1, a vector": ("falcon_h1", {"mamba_d_ssm": 64, "mamba_d_head": 8}),
    "falcon_h1, gated last": ("falcon_h1", {"mamba_d_ssm": 64, "mamba_d_head": 8, "mamba_norm_before_gate": True}),
    "falcon_h1 without a norm": ("falcon_h1", {"mamba_d_ssm": 64, "mamba_d_head": 8, "mamba_rms_norm": False}),
    "zamba": ("zamba", ZAMBA | {"mamba_proj_bias": True}),
    "zamba, fewer heads than ranks": ("zamba", ZAMBA | {"n_mamba_heads": 1}),
    "zamba2": ("zamba2", ZAMBA2),
}
CUT = dict.fromkeys(CONFIGS, 0.97) | {
    "mamba2, what does not fit": 0.85,
    "zamba, fewer heads than ranks": 0.8,
    "zamba2": 0.9,
}
"""Of the parameters of the layers, the share that is cut on four ranks."""


@dataclass
class Seen:
    """What a model computes: in training, of two micro-batches; decoding token by token, with either cache."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    training: list[bool]


def build(name: str) -> PreTrainedModel:
    """The tiny model of a config."""
    kind, options = CONFIGS[name]
    return tiny.build(kind, **SMALL | options)


def measure(model: PreTrainedModel, padded: bool = True) -> Seen:
    """What it computes of random ids."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(3, 31, (2, 2, 9), generator=generator), torch.ones(2, 2, 9, dtype=torch.long)
    mask[1, 0, :3] = int(not padded)
    outputs = []
    for micro_batch, seen in zip(ids, mask, strict=True):
        output = model.train()(input_ids=micro_batch, attention_mask=seen, labels=micro_batch)
        output.loss.backward()
        outputs += [output.logits.detach(), output.loss.detach()]
    training = [module.training for module in model.modules()]
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        outputs += decode(model.eval(), ids[0], cache)
    return Seen(outputs, {name: p.grad for name, p in model.named_parameters()}, training)


@torch.no_grad()
def decode(model: PreTrainedModel, ids: Tensor, cache: object) -> list[Tensor]:
    """Six tokens at once, then one by one."""
    name = "cache_params" if model.config.model_type in ("mamba", "falcon_mamba", "mamba2") else "past_key_values"
    steps = [ids[:, :6], *ids[:, 6:].split(1, 1)]
    return [model(input_ids=step, use_cache=True, **{name: cache}).logits for step in steps]


def compare(threads, model: PreTrainedModel, size: int, padded: bool = True, plan: str = "auto") -> shardwise.Plan:
    """Every figure of `model` on `size` ranks is that of one process. Gives the plan.

    Float32 sums of some 100 terms of order 1 differ by 1e-6; what is lost, or counted twice, is off by some percent at least.
    """
    alone, table = measure(copy.deepcopy(model), padded), shardwise.plan(model, size, plan=plan)

    def on_rank() -> Seen:
        return measure(shardwise.parallelize(copy.deepcopy(model), tp_axis(), table), padded)

    for rank, seen in enumerate(threads(on_rank, size)):
        assert all(seen.training)
        for ours, theirs in zip(seen.outputs, alone.outputs, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        for name, gradient in alone.gradients.items():
            assert gradient is not None
            error = (seen.gradients[name] - table[name].layout.shard(gradient, rank, size)).abs().max()
            assert error <= 1e-3 * gradient.abs().max(), (rank, name)
    return table


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_mixers(name, size, threads):
    """Guards: z, x, B, C and dt cut straight through; heads without the groups that they read; gradients of B and C, and of
    norms behind `x_proj`, of the rank's own heads alone; statistics of a part of a group; states of a cache at full size.
    """
    plan = compare(threads, build(name), size)
    rows = [row for row in plan if ".layers." in row.name and not row.buffer]
    if size == 4:
        assert sum(row.bytes for row in rows if row.sharded) >= CUT[name] * sum(row.bytes for row in rows)


@pytest.mark.parametrize(("name", "least"), [("jamba", 0.97), ("mamba2, a group", 0.97), ("zamba", 0.9), ("zamba2", 0.85)])
def test_inferred(name, least, threads):
    """Guards: mixers left whole for what no product shows (a product in the middle, statistics over all heads, numbers of
    theirs); layers that are tied to others taken for these, and computed on whole activations.
    """
    plan = compare(threads, build(name), 2, plan="infer")
    rows = [row for row in plan if ".layers." in row.name and not row.buffer]
    assert sum(row.bytes for row in rows if row.sharded) >= least * sum(row.bytes for row in rows)


def fused_mamba(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, B, C, D, delta_bias, **kwargs):
    """What the kernel of `mamba_ssm` computes: a whole Mamba mixer but for `in_proj`."""
    x, z = xz.chunk(2, 1)
    taps = conv_weight.shape[-1]
    x = silu(torch.nn.functional.conv1d(x, conv_weight, conv_bias, padding=taps - 1, groups=x.shape[1])[..., : x.shape[-1]])
    dt, b, c = linear(x.mT, x_proj).split([dt_proj.shape[1], A.shape[1], A.shape[1]], -1)
    dt, state, outputs = softplus(dt_proj @ dt.mT + delta_bias[:, None]), 0, []
    for t in range(x.shape[-1]):
        state = torch.exp(A * dt[..., t, None]) * state + dt[..., t, None] * b[:, None, t] * x[..., t, None]
        outputs.append((state * c[:, None, t]).sum(-1))
    return linear(((torch.stack(outputs, -1) + D[:, None] * x) * silu(z)).mT, out_proj, out_bias)


@pytest.mark.parametrize("biased", [True, False])
def test_fused_kernel_of_mamba(biased, threads, monkeypatch):
    """Guards: with `mamba_ssm` installed a mixer in training is one kernel, which multiplies by this rank's columns of the
    output projection, and nobody sums.
    """
    module, called = importlib.import_module("transformers.models.mamba.modeling_mamba"), []

    def kernel(*args, **kwargs):
        called.append(None)
        return fused_mamba(*args, **kwargs)

    monkeypatch.setattr(module, "mamba_inner_fn", kernel)
    compare(threads, tiny.build("mamba", **SMALL, use_bias=biased), 2, padded=False)  # the kernel knows no mask
    assert len(called) == 2  # in one process, one for each micro-batch


@pytest.mark.parametrize("name", ["mamba2, a group", "mamba2, what does not fit", "falcon_h1, a vector", "zamba2"])
def test_fused_kernel_of_mamba2(name, threads, monkeypatch):
    """Guards: the same of Mamba-2, where the kernel also norms, by the rank's own statistics; and of a mixer that is computed
    whole, whose output projection is cut.
    """
    model = build(name)
    expected = compare(threads, model, 4)
    kind = CONFIGS[name][0]
    module, called = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), []
    monkeypatch.setattr(module, "mamba2_split_conv1d_scan_combined", lambda *args, **kwargs: called.append(None))

    def on_rank() -> Tensor:
        parallel = shardwise.parallelize(copy.deepcopy(model), tp_axis(), expected)
        return parallel.train()(input_ids=torch.arange(8)[None], use_cache=False).logits

    threads(on_rank, 4)
    assert called == []
    model.train()(input_ids=torch.arange(8)[None], use_cache=False)
    assert called
