"""What is done to a parallel model afterwards, and would be wrong in silence, is said."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune, weight_norm

import shardwise
from models import batches, build
from shardwise.collectives import copy_to_tp, gather_from_tp, reduce_from_tp
from shardwise.errors import PlanError, ShardwiseError
from shardwise.testing import RankError

LAYER = "model.layers.0.mlp.down_proj"
CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": weight_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}


def said(threads: object, model: nn.Module, change: Callable[[nn.Module], object]) -> str:
    """On two ranks: what `change` of the parallel model raises."""

    def on_rank() -> str:
        mine = shardwise.parallelize(copy.deepcopy(model))
        with pytest.raises(ShardwiseError) as error:
            change(mine)
        return str(error.value)

    first, second = threads(on_rank, 2)
    assert first.splitlines()[0] == second.splitlines()[0]
    return first


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_what_looks_at_a_whole_matrix(name, threads):
    """Guards: norms over a rank's columns, and each rank's smallest elements pruned, as the matrix's; a `KeyError`."""
    model = build("llama")

    def change(mine: nn.Module) -> None:
        CHANGES[name](mine.get_submodule(LAYER))
        batches()[0].loss(mine)

    assert "RowwiseLinear: what its weight is made by would see this rank's part alone" in said(threads, model, change)
    CHANGES[name](model.get_submodule(LAYER))
    with pytest.raises(PlanError, match=f"{LAYER}: its weight is computed anew from others"):
        shardwise.plan(model, 2)


def test_parametrizations_by_element(threads):
    """Guards: refusing what is right on a part: an element's value is made of its own alone."""
    model = build("llama")

    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    def loss(mine: nn.Module) -> float:
        nn.utils.parametrize.register_parametrization(mine.get_submodule(LAYER), "weight", Twice())
        return batches()[0].loss(mine).item()

    expected = loss(copy.deepcopy(model))
    models = [copy.deepcopy(model) for _ in range(2)]
    for found in threads(lambda: loss(shardwise.parallelize(models.pop())), 2):
        assert found == pytest.approx(expected, rel=1e-5)


VERBS: dict[str, Callable[[nn.Module], object]] = {
    "full_state_dict": shardwise.full_state_dict,
    "full_gradients": shardwise.full_gradients,
    "clip_grad_norm_": lambda part: shardwise.clip_grad_norm_(part, 1.0),
    "unparallelize": shardwise.unparallelize,
    "save_pretrained": lambda part: part.save_pretrained("nowhere"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_part_of_a_parallel_model(verb, threads, tmp_path, monkeypatch):
    """Guards: a rank's shards given, clipped or saved as the whole tensors of the base model of a causal LM."""
    monkeypatch.chdir(tmp_path)
    assert "LlamaModel" in said(threads, build("llama"), lambda mine: VERBS[verb](mine.model))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["full_state_dict", "full_gradients", "save_pretrained"])
def test_another_dtype_on_one_rank(verb, threads, tmp_path):
    """Guards: a rank that receives as many bytes as it has itself, and waits for those that nobody sends."""

    def change(mine: nn.Module) -> None:
        if dist.get_rank() == 1:
            mine.to(torch.bfloat16)
        verbs = VERBS | {"save_pretrained": lambda model: model.save_pretrained(tmp_path)}
        verbs[verb](mine)

    found = said(threads, build("llama"), change)
    assert f"{verb}: the dtype of a parameter or buffer on rank 1 is not that of rank 0" in found


@pytest.mark.parametrize("verb", ["full_gradients", "clip_grad_norm_"])
def test_a_norm_that_summed_its_gradient_is_replaced(verb, threads):
    """Guards: the gradient of a rank's own heads taken for that of all."""

    def change(mine: nn.Module) -> None:
        attention = mine.model.layers[0].self_attn
        attention.q_norm = copy.deepcopy(build("qwen3").model.layers[0].self_attn.q_norm)
        batches()[0].loss(mine).backward()
        VERBS[verb](mine)

    assert "model.layers.0.self_attn.q_norm was replaced" in said(threads, build("qwen3"), change)


@pytest.mark.parametrize("collective", [copy_to_tp, reduce_from_tp, gather_from_tp])
def test_forward_mode_differentiation(collective, threads):
    """Guards: tangents that are summed over no ranks."""
    from on_ranks import world

    with forward_ad.dual_level(), pytest.raises(RankError, match="Forward-mode differentiation"):
        threads(lambda: collective(torch.ones(2, 2), world("tp")), 2)
