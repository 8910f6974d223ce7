"""The field's defects that give wrong numbers. Every check runs on the package, and with the defect put back, where it fails.

Dropout's are in `test_dropout`, the collectives' in `test_collectives`, those that fail late in `test_defects_late`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import linear
from torch.testing import assert_close

import shardwise
from blocks import (
    ATTENTION_PLAN,
    Attention,
    GatedMlp,
    Mlp,
    TwoHalves,
    check_parity,
    fails,
    randomize,
    tp_axis,
    train,
    weights_like,
    x,
)
from llamas import IDS, llama
from shardwise import api, planning
from shardwise.collectives import ReduceFromTP, reduce_from_tp
from shardwise.errors import PlanError
from shardwise.layers import ColwiseParallel, PackedColwiseParallel, PackedRowwiseParallel, RowwiseParallel, base, replicated
from shardwise.layout import Packed
from shardwise.lockstep import Lockstep
from shardwise.names import Names
from shardwise.spec import Rule
from shardwise.training import clip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
    monkeypatch.setattr(planning, "check_coverage", lambda model, table: None)
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

    def too_many(names: Names, rule: Rule) -> list[str]:
        every = (name for family in names._families.values() for name in family)
        return [name for name in every if generic(rule.pattern) == generic(name)]

    monkeypatch.setattr(Names, "matching", too_many)
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
            patch.setattr(Lockstep, "is_due", lambda *_: False)  # which would tell
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
