"""The field's defects, one test each. Every check runs on the package, and with the defect put back, where it fails.

Dropout's are in `test_dropout`, the collectives' in `test_collectives`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import linear
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import StaticLayer

import shardwise
from blocks import (
    ATTENTION_PLAN,
    Attention,
    GatedMlp,
    Mlp,
    TwoHalves,
    check_parity,
    dense_layer,
    randomize,
    tp_axis,
    train,
    weights_like,
)
from shardwise import api, collectives
from shardwise.collectives import GatherFromTP, ReduceFromTP, reduce_from_tp
from shardwise.errors import MissingRankError, PlanError
from shardwise.heads import Heads
from shardwise.layers import ColwiseParallel, PackedColwiseParallel, PackedRowwiseParallel, RowwiseParallel, base, replicated
from shardwise.layout import Block, Packed
from shardwise.parallelize import required_state
from shardwise.spec import Rule
from shardwise.testing import RankError, RankTimeoutError
from shardwise.training import clip

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def x(*shape: int) -> Tensor:
    """Random float64."""
    return torch.randn(*shape, dtype=torch.float64)


def fails(check: functools.partial) -> None:
    """The check bites: it raises, here with a defect in place."""
    with pytest.raises((AssertionError, RankError)):
        check()


def llama(**changes: object) -> LlamaForCausalLM:
    """A tiny one."""
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**TINY, **changes}))


# --- wrong numbers ---


def test_gradient_accumulation_through_summed_parameters(threads, monkeypatch):
    """Guards: all-reducing the accumulated `.grad` of q_norm and k_norm: 1.5 times the gradient after two micro-batches."""
    model = randomize(Attention())
    one = functools.partial(check_parity, threads, 2, model, ATTENTION_PLAN, (x(2, 3, 12),))
    two = functools.partial(one, (x(2, 3, 12),))
    two()

    def sum_accumulated(parameter: Tensor, layout: object, shape: object, mesh: DeviceMesh) -> Tensor:
        if parameter._post_accumulate_grad_hooks is None:
            parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad, group=mesh.get_group()))
        return parameter

    monkeypatch.setattr(base, "sum_gradient", sum_accumulated)
    one()  # what one micro-batch does not show
    fails(two)


def test_row_bias_is_added_once(threads, monkeypatch):
    """Guards: a bias added by every rank before the sum, that is `size` times."""
    check = functools.partial(check_parity, threads, 2, randomize(Mlp()), {"up": "colwise", "down": "rowwise"}, (x(2, 6),))
    check()
    monkeypatch.setattr(
        RowwiseParallel, "forward", lambda self, x: reduce_from_tp(linear(x, self.weight, self.bias), self._tp.mesh)
    )
    fails(check)


@pytest.mark.parametrize(
    ("model", "plan", "style", "straight"),
    [
        (GatedMlp, {"gate_up": "packed_colwise", "down": "rowwise"}, PackedColwiseParallel, ColwiseParallel),
        (TwoHalves, {"a": "colwise", "b": "colwise", "down": "packed_rowwise"}, PackedRowwiseParallel, RowwiseParallel),
    ],
)
def test_fused_weights_are_cut_block_by_block(model, plan, style, straight, threads, monkeypatch):
    """Guards: fused weights sliced straight through: the first rank gets the gates and the second the ups."""
    check = functools.partial(check_parity, threads, 2, randomize(model()), plan, (x(2, 6),))
    check()
    monkeypatch.setattr(style, "layout", vars(straight)["layout"])
    fails(check)


class Tied(nn.Module):
    """Embedding and head are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids))


def test_tied_embeddings(threads, monkeypatch):
    """Guards: a head that keeps the full weight, whose gathered logits are `size` times too wide; one use's gradient lost."""
    plan = {"emb": "embedding_rowwise", "head": "colwise_gather_output"}
    check = functools.partial(check_parity, threads, 2, randomize(Tied()), plan, (torch.tensor([[1, 10, 5], [5, 0, 7]]),))
    check()
    apply = api.apply_plan

    def forget_aliases(model: nn.Module, table: shardwise.Plan, *rest: object) -> None:
        rows = [type(row)(*(getattr(row, name) for name in row.__slots__ if name != "aliases")) for row in table]
        apply(model, shardwise.Plan(table.size, tuple(rows), table.modules), *rest)

    monkeypatch.setattr(api, "apply_plan", forget_aliases)
    fails(check)


def test_experts_without_a_rule(monkeypatch):
    """Guards: experts that every rank keeps whole, in silence, because no rule matches their names."""
    model = nn.ModuleDict({"attn": nn.Linear(8, 8), "experts": nn.ModuleList(nn.Linear(8, 16) for _ in range(4))})
    with pytest.raises(PlanError, match=r"experts\.\*\.weight"):
        shardwise.plan(model, 2, {"attn": "colwise"})
    monkeypatch.setattr(api, "check_coverage", lambda model, table: None)
    table = shardwise.plan(model, 2, {"attn": "colwise"})  # the defect: nobody says anything
    assert table.local_bytes(0) > 0.9 * table.full_bytes


class Numbered(nn.Module):
    """A gated MLP whose layers are called w1, w2 and w3, as many are."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(torch.tanh(self.w1(x)) * self.w3(x))


def test_digits_in_names(threads, monkeypatch):
    """Guards: `w1`, `w2` and `w3` all read as `w*`, so that the last rule holds for all of them."""
    plan = {"0.w1": "colwise", "0.w2": "rowwise", "0.w3": "colwise"}
    check = functools.partial(check_parity, threads, 2, nn.Sequential(randomize(Numbered())), plan, (x(2, 6),))
    check()
    generic = functools.partial(re.sub, r"\d+", "*")
    monkeypatch.setattr(Rule, "matches", lambda self, name: generic(self.pattern) == generic(name))
    fails(check)


def _norm(model: nn.Module, plan: dict[str, str], hidden: Tensor) -> Tensor:
    model = shardwise.parallelize(copy.deepcopy(model), tp_axis(), plan=plan)
    train(model, [(hidden,)], weights_like(hidden))
    return shardwise.clip_grad_norm_(model, 1.0)


def test_norm_counts_replicated_parameters_once(threads, monkeypatch):
    """Guards: a norm in which what every rank holds counts `size` times, or what only one rank holds not at all."""
    model, hidden = randomize(Attention(kv_heads=2)), x(2, 3, 12)
    alone = copy.deepcopy(model)
    train(alone, [(hidden,)], weights_like(hidden))
    expected = nn.utils.clip_grad_norm_(alone.parameters(), 1.0)

    def check() -> None:
        for total in threads(_norm, 4, model, ATTENTION_PLAN, hidden):
            assert_close(total, expected)

    check()
    with monkeypatch.context() as patch:
        patch.setattr(clip, "_counted", lambda row, gradient, state: iter([gradient]))
        fails(check)
    monkeypatch.setattr(clip.dist, "all_reduce", lambda *args, **kwargs: None)  # each rank by its own
    fails(check)


def test_loss_is_not_scaled_by_the_size(threads, monkeypatch):
    """Guards: an all-reduce in the backward of the row-wise sum, as in torch's functional one: gradients times `size`."""
    check = functools.partial(check_parity, threads, 2, randomize(Mlp()), {"up": "colwise", "down": "rowwise"}, (x(2, 6),))
    check()

    def summed_again(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_from_tp(gradient.clone(), ctx.mesh), None

    monkeypatch.setattr(ReduceFromTP, "backward", staticmethod(summed_again))
    fails(check)


def _sample(path: str, defect: bool) -> list[int]:
    model = shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
    torch.manual_seed(dist.get_rank())
    module = importlib.import_module("shardwise.model")
    with pytest.MonkeyPatch.context() as patch:
        if defect:
            patch.setattr(module, "same_random_state", lambda mesh: None)
        return model.generate(IDS[:1, :4], max_new_tokens=16, do_sample=True, temperature=5.0)[0].tolist()


def test_sampling_draws_one_token(pool2, tmp_path):
    """Guards: ranks that draw different tokens, and then compute on different texts."""
    llama().save_pretrained(tmp_path)
    first, second = pool2.run(_sample, str(tmp_path), False)
    assert first == second
    assert len(set(first)) > 5
    first, second = pool2.run(_sample, str(tmp_path), True)
    assert first != second


def _copied(model: nn.Module, hidden: Tensor, closures: bool) -> tuple[Tensor, Tensor]:
    model = shardwise.parallelize(copy.deepcopy(model), tp_axis(), plan={"up": "colwise", "down": "rowwise"})
    for module in (model.up, model.down) if closures else ():
        own = module.forward
        module.forward = lambda value, own=own: own(value)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return copied(hidden).detach(), model(hidden).detach()


def test_deepcopy_computes_with_its_own_weights(threads):
    """Guards: a copy whose replaced `forward` still holds the original's module."""
    model, hidden = randomize(Mlp()), x(2, 6)
    expected = model(hidden).detach()
    for copied, original in threads(_copied, 2, model, hidden, False):
        assert_close(copied, expected)
        assert not original.any()
    for copied, _ in threads(_copied, 2, model, hidden, True):  # the defect
        assert not torch.allclose(copied, expected)


class Transposed(nn.Module):
    """Gives a tensor that is not contiguous, and a part on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix = nn.Linear(6, 8), nn.Parameter(torch.zeros(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.mix @ self.up(x).mT).mT


def test_reduction_of_a_tensor_that_is_not_contiguous(threads, monkeypatch):
    """Guards: a sum written to a contiguous copy, and thereby dropped."""
    plan = {"0.up": "colwise", "0.mix": "rowwise", "0": "all_reduce"}
    check = functools.partial(check_parity, threads, 2, nn.Sequential(randomize(Transposed())), plan, (x(3, 6),))
    check()

    def dropped(value: Tensor, mesh: DeviceMesh) -> Tensor:
        dist.all_reduce(value.detach().contiguous(), group=mesh.get_group())
        return value

    monkeypatch.setattr(replicated, "reduce_from_tp", dropped)
    fails(check)


def _there_and_back(model: nn.Module) -> dict[str, Tensor]:
    model = shardwise.parallelize(copy.deepcopy(model), tp_axis(), plan={"gate_up": "packed_colwise", "down": "rowwise"})
    return shardwise.unparallelize(model).state_dict()


def test_packed_weights_come_back_in_order(threads, monkeypatch):
    """Guards: shards of packed weights put one behind the other: gate up gate up. (Files are compared in `test_parity`.)"""
    model = randomize(GatedMlp())

    def check() -> None:
        for found in threads(_there_and_back, 2, model):
            assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())

    check()
    monkeypatch.setattr(Packed, "unshard", lambda self, shards, shape: torch.cat(tuple(shards), self.dim))
    fails(check)


# --- late or obscure failures ---


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
    monkeypatch.setattr("shardwise.saving.meet", lambda *arguments: None)
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
