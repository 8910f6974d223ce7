"""The field's defects that show late, or obscurely. Every check runs on the package, and with the defect put back."""

from __future__ import annotations

import copy
import functools
import importlib
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.cache_utils import StaticLayer

import shardwise
from blocks import (
    ATTENTION_PLAN,
    Attention,
    check_parity,
    dense_layer,
    fails,
    randomize,
    tp_axis,
    train,
    weights_like,
    x,
)
from llamas import IDS, llama
from shardwise import collectives
from shardwise.collectives import GatherFromTP
from shardwise.errors import MissingRankError
from shardwise.heads import Heads
from shardwise.layout import Block
from shardwise.model_state import required_state
from shardwise.testing import RankError, RankTimeoutError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_more_ranks_than_kv_heads(threads, monkeypatch):
    """Guards: a `view` error in the first forward, or query heads that are paired with other KV heads."""
    check = functools.partial(check_parity, threads, 4, randomize(Attention(kv_heads=2)), ATTENTION_PLAN, (x(2, 3, 12),))
    check()
    with monkeypatch.context() as patch:
        patch.setattr(Heads, "local_group", lambda self, size: self.group)
        fails(check)
    monkeypatch.setattr(Block, "copies", lambda self, size: 1)  # shared heads whose gradients nobody sums
    fails(check)


@pytest.mark.parametrize("style", ["embedding_rowwise", "colwise_gather_output"])
def test_vocabulary_that_does_not_divide(style, threads, monkeypatch):
    """Guards: the last rows lost, or a refusal."""
    layer, values = (nn.Embedding(11, 6), torch.tensor([[0, 10, 5]])) if "emb" in style else (nn.Linear(6, 11), x(2, 6))
    check = functools.partial(check_parity, threads, 2, randomize(nn.Sequential(layer)), {"0": style}, (values,))
    check()
    monkeypatch.setattr(Block, "bounds", lambda self, r, size: (r * (self.units // size), (r + 1) * (self.units // size)))
    fails(check)


def _save_on_rank_0(model: nn.Module, path: str) -> float:
    model = shardwise.parallelize(copy.deepcopy(model), tp_axis())
    start = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(MissingRankError, match=r"(?s)rank 1 had not called it.*if rank == 0"):
            model.save_pretrained(path, timeout=1.0)
    return time.monotonic() - start


def _save_after_all(model: nn.Module, path: str) -> dict[str, Tensor] | None:
    model = shardwise.parallelize(copy.deepcopy(model), tp_axis())
    if dist.get_rank() == 0:
        with pytest.raises(MissingRankError):
            model.save_pretrained(path, timeout=0.5)
    dist.barrier()
    model.save_pretrained(path)
    return shardwise.full_state_dict(model)


def test_save_on_the_first_rank_only(threads, pool2, tmp_path, monkeypatch):
    """Guards: a hang of ten minutes; or ranks that are out of step after the error, so that the next collective hangs."""
    model = llama()
    assert max(threads(_save_on_rank_0, 2, model, str(tmp_path))) < 10
    assert not list(tmp_path.iterdir())
    full, none = pool2.run(_save_after_all, model, str(tmp_path))
    assert none is None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, full[name]) for name, tensor in loaded.state_dict().items())
    monkeypatch.setattr("shardwise.saving.meet_ranks", lambda *arguments: None)
    with pytest.raises(RankTimeoutError):
        threads(_save_on_rank_0, 2, model, str(tmp_path), timeout=3.0)


def _generate(model: nn.Module, cache: str) -> Tensor:
    model = shardwise.parallelize(copy.deepcopy(model), tp_axis())
    return model.generate(IDS[:, :4], max_new_tokens=8, do_sample=False, cache_implementation=cache)


@pytest.mark.parametrize("size", [2, 4])
def test_static_cache_has_local_heads(size, threads, monkeypatch):
    """Guards: a cache sized for all heads of the config, into which the local ones do not fit."""
    model = llama().eval()
    expected = model.generate(IDS[:, :4], max_new_tokens=8, do_sample=False)

    def check() -> None:
        for tokens in threads(_generate, size, model, "static"):
            assert torch.equal(tokens, expected)

    check()
    real = StaticLayer.lazy_initialization

    def of_the_config(self: StaticLayer, keys: Tensor, values: Tensor) -> None:
        real(self, keys.new_zeros(keys.shape[0], 4, *keys.shape[2:]), values.new_zeros(values.shape[0], 4, *values.shape[2:]))

    monkeypatch.setattr(StaticLayer, "lazy_initialization", of_the_config)
    fails(check)


def _steps(model: nn.Module, hidden: Tensor, optimizer: str, dtensor: bool) -> tuple[dict[str, Tensor], object]:
    model = shardwise.parallelize(copy.deepcopy(model), tp_axis(), plan=ATTENTION_PLAN)
    if dtensor:
        kind = importlib.import_module("torch.distributed.tensor").DTensor
        model.o_proj.bias = nn.Parameter(kind.from_local(model.o_proj.bias.detach(), tp_axis(), run_check=False))
        model.o_proj.bias.grad = kind.from_local(torch.zeros(12, dtype=torch.float64), tp_axis(), run_check=False)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    chosen = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, foreach=True)
    for _ in range(1 if dtensor else 3):
        if not dtensor:
            chosen.zero_grad()
            train(model, [(hidden,)], weights_like(hidden))
        chosen.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, required_state(model).plan


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_foreach_optimizers(optimizer, threads):
    """Guards: parameters of mixed types (DTensor beside Tensor), on which `foreach` raises; replicas that drift apart."""
    model, hidden = randomize(Attention(kv_heads=2)), x(2, 3, 12)
    alone = copy.deepcopy(model)
    chosen = getattr(torch.optim, optimizer)(alone.parameters(), lr=0.1)
    for _ in range(3):
        chosen.zero_grad()
        train(alone, [(hidden,)], weights_like(hidden))
        chosen.step()
    for rank, (found, table) in enumerate(threads(_steps, 4, model, hidden, optimizer, False)):
        for name, parameter in alone.named_parameters():
            assert_close(found[name], table[name].layout.shard(parameter.detach(), rank, 4), rtol=1e-6, atol=1e-8)
    with pytest.raises(RankError, match="mixed"):
        threads(_steps, 2, model, hidden, optimizer, True)


class Clipped(nn.Module):
    """Clamps in place what its layer gives, as OLMo's attention does with qkv, through views of it too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y.clamp_(-0.5, 0.5)
        first, _ = y.view(-1, y.shape[-1]).tensor_split(2, -1)
        first.mul_(2)
        return y


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (1,), (4,)])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("style", ["colwise_gather_output", "rowwise_split_input", "embedding_rowwise", "embedding_colwise"])
def test_in_place_ops_on_outputs(style, size, shape, threads, monkeypatch):
    """Guards: an output that is a view of what a custom Function made, which autograd does not let anyone write to.

    With one row, a gathered tensor needs no copy to have its parts in order: then it is such a view.
    """
    layer = nn.Embedding(12, 6) if "embedding" in style else dense_layer("linear", 6, 6)
    values = torch.arange(12)[: torch.Size(shape).numel()].view(shape) if "embedding" in style else x(*shape, 6)
    check = functools.partial(check_parity, threads, size, randomize(Clipped(layer)), {"layer": style}, (values,))
    check()
    if style in ("colwise_gather_output", "embedding_colwise"):

        def a_view(ctx: object, x: Tensor, *call: object) -> Tensor:
            ctx.call = call
            return collectives._all_gather(x, *call)[:]

        monkeypatch.setattr(GatherFromTP, "forward", staticmethod(a_view))
        fails(check)
