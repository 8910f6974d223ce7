"""Whole models, experts dealt to the ranks: memory that nobody wrote, ranks and experts without tokens, auxiliary losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import grouped_mm
from transformers import AutoModelForCausalLM, PreTrainedModel

from figures import gradient_error, gradients, load_sharded
from models import Batch, batches
from parity import types
from parity.job import GRADIENTS, LOGITS, LOSS, quiet

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
# Gated experts; experts and a router with biases; experts without a gate, in some layers; shared ones beside them.
NAMES = ("mixtral", "gpt_oss", "nemotron_h", "qwen2_moe")
TRAVEL = {"model.layers.*.mlp.experts": "ep_all_to_all_experts"}
AUXILIARY: dict[str, object] = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


@dataclass(frozen=True)
class Found:
    """The logits and losses of two micro-batches, and their gradients (None on all ranks but the first)."""

    logits: list[Tensor]
    losses: list[Tensor]
    gradients: dict[str, Tensor] | None


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote to is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def find(model: PreTrainedModel, feed: list[Batch]) -> Found:
    """In train mode."""
    model.train()
    logits, losses = [], []
    for batch in feed:
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        output.loss.backward()
        logits.append(output.logits.detach())
        losses.append(output.loss.detach())
    return Found(logits, losses, gradients(model))


def find_dealt(path: Path, feed: list[Batch], implementation: str, tp_plan: str | dict[str, str] = "auto") -> Found:
    """On every rank, which has its own experts."""
    ranks = dist.get_world_size()
    with poisoned(), quiet():
        return find(load_sharded(path, ep_size=ranks, experts_implementation=implementation, tp_plan=tp_plan), feed)


class Models:
    """Checkpoints and what one process finds, once a type."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path, self.plain = cache(self._path), cache(self._plain)

    def _path(self, name: str) -> Path:
        wanted = {key: value for key, value in AUXILIARY.items() if key in types.fields(name)}
        with quiet():
            types.build(name, **wanted).save_pretrained(self.directory / name)
        return self.directory / name

    def _plain(self, name: str, same: bool) -> Found:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(self.path(name), dtype=torch.float32, experts_implementation="eager")
        return find(model, one_word() if same else batches()[:2])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    """For all tests of this module."""
    return Models(tmp_path_factory.mktemp("experts"))


def one_word() -> list[Batch]:
    """Micro-batches of one id each, over and over: every token goes to the same two of four experts."""
    made = []
    for word in (5, 77):
        ids = torch.full((2, 9), word)
        made.append(Batch(ids, torch.ones_like(ids), ids.clone()))
    return made


def check(ranks: list[Found], expected: Found) -> None:
    """What the ranks found is finite, and what one process found."""
    for rank in ranks:
        for actual, plain in zip(rank.logits, expected.logits, strict=True):
            assert actual.isfinite().all()
            assert (actual - plain).abs().max() < LOGITS
        for actual, plain in zip(rank.losses, expected.losses, strict=True):
            assert (actual - plain).abs() < LOSS
    assert ranks[0].gradients is not None
    assert expected.gradients is not None
    assert [name for name, gradient in ranks[0].gradients.items() if not gradient.isfinite().all()] == []
    assert gradient_error(ranks[0].gradients, expected.gradients) < GRADIENTS


def test_unwritten_memory_is_seen():
    """Guards: a poison that does not reach the rows which grouped products leave out, so that nothing below is tested."""
    rows, weights = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, 8)
    with poisoned():
        product = grouped_mm(rows, weights, offs=torch.tensor([1, 2], dtype=torch.int32))
        product[:2].sum().backward()
    assert product.isnan().any(1).tolist() == [False, False, True, True]
    assert rows.grad.isnan().any(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_unwritten_rows(name, implementation, models, pool2):
    """Guards: rows of other ranks' experts, which grouped products leave as they find them, in the output or in a gradient; a
    load-balancing loss of the local experts alone, or one whose gradient each rank adds.
    """
    check(pool2.run(find_dealt, models.path(name), batches()[:2], implementation), models.plain(name, same=False))


@pytest.mark.parametrize("tp_plan", ["auto", TRAVEL], ids=["sum", "travel"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_ranks_and_experts_without_tokens(name, implementation, tp_plan, models, pool4):
    """Guards: a rank without a token, in memory that nobody wrote: its weights' gradients, its part of the sum, a hang."""
    ranks = pool4.run(find_dealt, models.path(name), one_word(), implementation, tp_plan)
    check(ranks, models.plain(name, same=True))


def test_two_experts_have_no_tokens(models):
    """Guards: the test above, with tokens for all."""
    model = AutoModelForCausalLM.from_pretrained(models.path("mixtral"), dtype=torch.float32)
    for batch in one_word():
        logits = model(input_ids=batch.input_ids).router_logits
        assert [len(layer.topk(2).indices.unique()) for layer in logits] == [2, 2]


def test_the_auxiliary_loss_counts(models):
    """Guards: tests of the load-balancing loss without one."""
    model = AutoModelForCausalLM.from_pretrained(models.path("mixtral"), dtype=torch.float32)
    batch = batches()[0]
    with_it = batch.loss(model)
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.0
    assert with_it - batch.loss(model) > 1000 * LOSS
