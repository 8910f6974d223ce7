"""`clip_grad_norm_`: the norm of the full gradient, each element of it once, and the same bits on every rank."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

import shardwise
from blocks import ATTENTION_PLAN, Attention, GatedMlp, randomize, tp_axis, under
from shardwise.model_state import required_state
from shardwise.testing import RankError

Gradients = dict[str, Tensor | None]

PLAN = {
    **under("attn", ATTENTION_PLAN),
    "attn": "local_params",
    "mlp.gate_up": "packed_colwise",
    "mlp.down": "rowwise",
    "emb": "embedding_rowwise",
}


def block(dtype: torch.dtype) -> nn.Module:
    """Parameters of every layout: whole, summed, cut, packed, and (k and v on four ranks) shared by two ranks each."""
    parts = {"attn": Attention(kv_heads=2), "mlp": GatedMlp(12, 9), "emb": nn.Embedding(11, 12), "norm": nn.LayerNorm(12)}
    torch.manual_seed(0)
    return randomize(nn.ModuleDict(parts)).to(dtype)


def gradients_of(model: nn.Module, scale: float = 1.0) -> Gradients:
    """Random gradients of the full shapes."""
    torch.manual_seed(1)
    return {name: torch.randn_like(p) * scale for name, p in model.named_parameters()}


def _clip(model: nn.Module, gradients: Gradients, max_norm: float, options: dict) -> tuple[Tensor, Gradients, object]:
    model = shardwise.parallelize(copy.deepcopy(model), tp_axis(), plan=PLAN)
    table, rank, size = required_state(model).plan, dist.get_rank(), dist.get_world_size()
    for name, parameter in model.named_parameters():
        if (gradient := gradients[name]) is not None:
            parameter.grad = table[name].layout.shard(gradient, rank, size)
    total = shardwise.clip_grad_norm_(model, max_norm, **options)
    return total, {name: p.grad for name, p in model.named_parameters()}, table


def full_norm(gradients: Gradients, norm_type: float) -> Tensor:
    """The norm of all elements, in float64."""
    return torch.cat([g.double().flatten() for g in gradients.values() if g is not None]).norm(norm_type)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm_of_the_full_gradient(dtype, norm_type, size, threads):
    """Guards: replicated or shared parameters counted by each rank that holds them, or each rank clipping by its own norm.

    The norm is exact to float32 also for bfloat16 gradients; the bug would count some tenths of the elements twice.
    """
    model = block(dtype)
    gradients = gradients_of(model)
    expected = full_norm(gradients, norm_type)
    results = threads(_clip, size, model, gradients, 0.5, {"norm_type": norm_type})
    for rank, (total, clipped, table) in enumerate(results):
        assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(total, results[0][0])
        assert_close(total.double(), expected, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            wanted = table[name].layout.shard(gradient.double() * (0.5 / (expected + 1e-6)), rank, size)
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
            assert_close(clipped[name].double(), wanted, rtol=tolerance, atol=1e-8)
    doubled = gradients | {f"{name}.again": g for name, g in gradients.items() if "norm" in name}  # the check bites
    if norm_type != math.inf:
        assert not torch.isclose(full_norm(doubled, norm_type), expected, rtol=1e-6, atol=0)


def test_small_gradients_are_left_alone(threads):
    """Guards: gradients scaled up to the largest norm."""
    model = block(torch.float32)
    gradients = gradients_of(model, 1e-4)
    for rank, (_, clipped, table) in enumerate(threads(_clip, 2, model, gradients, 1.0, {})):
        assert all(torch.equal(clipped[name], table[name].layout.shard(g, rank, 2)) for name, g in gradients.items())


@pytest.mark.parametrize("kept", ["norm", "attn.k_proj", "mlp", ""])
def test_parameters_without_gradients(kept, threads):
    """Guards: frozen parameters, up to a rank on which no gradient counts (those of whole parameters count on the first), where
    torch's norms of an empty list raise, on that rank only.
    """
    model = block(torch.float32)
    gradients = {name: g if kept and name.startswith(kept) else None for name, g in gradients_of(model).items()}
    expected = full_norm(gradients, 2.0) if kept else torch.zeros((), dtype=torch.float64)
    for total, clipped, _ in threads(_clip, 4, model, gradients, 0.1, {}):
        assert_close(total.double(), expected, rtol=1e-6, atol=0)
        assert {name for name, g in clipped.items() if g is None} == {name for name, g in gradients.items() if g is None}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_error_if_nonfinite(value, threads):
    """Guards: an error on the rank that holds the element only, while the others go on with the next step and hang."""
    model = block(torch.float32)
    gradients = gradients_of(model)
    gradients["emb.weight"][-1, -1] = value  # on the last rank
    with pytest.raises(RankError, match=r"(?s)not finite.*rank 1 failed too|rank 1 .*not finite.*rank 0 failed too"):
        threads(_clip, 2, model, gradients, 1.0, {"error_if_nonfinite": True})
    totals = [total for total, _, _ in threads(_clip, 2, model, gradients, 1.0, {})]
    assert not any(torch.isfinite(total) for total in totals)


@pytest.mark.parametrize("foreach", [True, False])
def test_with_and_without_foreach(foreach, threads):
    """Guards: an option of torch's that is lost."""
    model = block(torch.float32)
    gradients = gradients_of(model)
    for total, _, _ in threads(_clip, 2, model, gradients, 1.0, {"foreach": foreach}):
        assert_close(total.double(), full_norm(gradients, 2.0), rtol=1e-6, atol=0)


def test_ordinary_model():
    """Guards: a training loop that has to tell one process from several."""
    ours, theirs = block(torch.float32), block(torch.float32)
    for model in (ours, theirs):
        for name, gradient in gradients_of(model).items():
            model.get_parameter(name).grad = gradient
    total = shardwise.clip_grad_norm_(ours, 0.5, norm_type=1.0)
    assert torch.equal(total, nn.utils.clip_grad_norm_(theirs.parameters(), 0.5, norm_type=1.0))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
