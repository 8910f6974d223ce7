"""A sharded model computes what one process computes: ten types, tp=2 and tp=4, on processes, through the public functions.

`figures.measure` asks a model everything once: in this process the plain one, on every rank the shards. The tests compare
the figures, so each type and size costs one job on the pool. That they would see the bugs they guard:
`test_parity_bugs.py`.

Tolerances: logits of float32 sums of some 100 terms of order 1 differ by 1e-6; 1e-4 leaves room for another order of
summation, and a lost or doubled term is of order 1. A gradient that is not summed, or is summed twice, is wrong by half its
size or by its size; noise is 1e-5 of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from figures import (
    Figures,
    gradient_error,
    load_sharded,
    measure_plain,
    measure_rounded,
    measure_rounded_sharded,
    measure_sharded,
    train,
    train_sharded,
)
from models import TYPES, build, checkpoint
from shardwise.testing import RankPool


@dataclass(frozen=True)
class Case:
    """One type on one number of ranks, beside the plain model."""

    expected: Figures
    ranks: list[Figures]
    loaded: Path
    saved: Path

    @property
    def first(self) -> Figures:
        """What the first rank found."""
        return self.ranks[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Figures]:
    """The figures of the plain model, once a type."""

    @cache
    def measured(name: str) -> Figures:
        return measure_plain(checkpoint(tmp_path_factory, name))

    return measured


@pytest.fixture(scope="module")
def cases(plain, pool2: RankPool, pool4: RankPool, tmp_path_factory) -> Callable[[str, int], Case]:
    """The figures of the ranks, once a type and size."""

    @cache
    def measured(name: str, tp: int) -> Case:
        path, saved = checkpoint(tmp_path_factory, name), tmp_path_factory.mktemp("saved") / name
        ranks = {2: pool2, 4: pool4}[tp].run(measure_sharded, path, saved)
        return Case(plain(name), ranks, path, saved)

    return measured


@pytest.fixture(params=[2, 4], ids=["tp2", "tp4"])
def tp(request: pytest.FixtureRequest) -> int:
    """The number of ranks."""
    return request.param


@pytest.fixture(params=list(TYPES))
def case(request: pytest.FixtureRequest, tp: int, cases) -> Case:
    """Each type on each number of ranks."""
    return cases(request.param, tp)


def test_logits(case):
    """Guards: a row bias added by every rank, fused weights cut straight through, KV heads paired with the wrong queries,
    tied logits that are tp times too wide.
    """
    for figures in case.ranks:
        torch.testing.assert_close(figures.logits, case.expected.logits, atol=1e-4, rtol=0)


def test_loss(case):
    """Guards: a loss scaled by the number of ranks, or taken over one rank's slice of the vocabulary."""
    for figures in case.ranks:
        torch.testing.assert_close(figures.losses, case.expected.losses, atol=1e-5, rtol=0)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_gradients(case, micro_batches):
    """Guards: partial gradients that nobody sums (q and k norms, routers, shared KV heads), sums made twice, and, from the
    second micro-batch on, a sum over the accumulated gradient, which counts the earlier micro-batches tp times. None
    missing, none extra.
    """
    actual, expected = case.first.gradients[micro_batches - 1], case.expected.gradients[micro_batches - 1]
    assert gradient_error(actual, expected) < 1e-3


def test_common_gradients_are_bit_equal(case):
    """Guards: replicas that drift apart, step by step, because each rank rounds its own sum."""
    seen: dict[str, Tensor] = {}
    for figures in case.ranks:
        for name, gradient in figures.held_in_common.items():
            assert torch.equal(seen.setdefault(name, gradient), gradient), name
    assert any("norm" in name for name in seen)


def test_norm_and_clipping(case):
    """Guards: a norm that counts replicated parameters once a rank, or shared KV heads once a holder; each rank scaling by
    its own.
    """
    for figures in case.ranks:
        for name, norm in case.expected.norms.items():
            torch.testing.assert_close(
                figures.norms[name], norm, rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert torch.equal(figures.norms[name], case.first.norms[name])
    assert gradient_error(case.first.clipped, case.expected.clipped) < 1e-3


def test_greedy_tokens(case):
    """Guards: a cache with the wrong heads in it, which a forward without cache does not see."""
    for figures in case.ranks:
        assert torch.equal(figures.greedy, case.expected.greedy)


def test_sampled_tokens(case):
    """Guards: each rank drawing from its own random state, so that the ranks go on from different tokens."""
    for figures in case.ranks:
        assert torch.equal(figures.sampled, case.expected.sampled)
    assert not torch.equal(case.expected.sampled, case.expected.greedy)


def test_saved_files_are_those_loaded(case):
    """Guards: packed weights that come back permuted, renamed keys, a lost file, another dtype: every byte of every file is
    compared.
    """
    loaded, saved = ({path.name: path.read_bytes() for path in at.iterdir()} for at in (case.loaded, case.saved))
    assert loaded.keys() == saved.keys()
    assert [name for name in loaded if loaded[name] != saved[name]] == []


def save_in_parts(path: Path, saved: Path) -> None:
    """On every rank: load what lies in several files, and save it so."""
    load_sharded(path).save_pretrained(saved, max_shard_size="50KB")


def test_saved_in_several_files(pool2, tmp_path):
    """Guards: a tensor in another file than the index says, other sizes of files: each byte as transformers saves what it
    has loaded.
    """
    loaded, plain, saved = tmp_path / "loaded", tmp_path / "plain", tmp_path / "saved"
    build("llama").save_pretrained(loaded, max_shard_size="50KB")
    AutoModelForCausalLM.from_pretrained(loaded).save_pretrained(plain, max_shard_size="50KB")
    pool2.run(save_in_parts, loaded, saved)
    actual, expected = ({path.name: path.read_bytes() for path in at.iterdir()} for at in (saved, plain))
    assert len(expected) > 4
    assert actual.keys() == expected.keys()
    assert [name for name in expected if actual[name] != expected[name]] == []


def test_full_state_dict(case):
    """Guards: shards put together in the wrong order, or padding left in."""
    expected, actual = case.expected.state, case.first.state
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    assert [figures.state for figures in case.ranks[1:]] == [None] * (len(case.ranks) - 1)


# Every expert takes part: with fewer, the noise sends a token near the border to another expert, a jump that hides the rest.
EVERY_EXPERT: dict[str, dict[str, object]] = {
    "mixtral": {"num_experts_per_tok": 4},
    "qwen3_moe": {"num_experts_per_tok": 4},
    "deepseek_v3": {"num_experts_per_tok": 4, "topk_group": 2},
}


@pytest.mark.parametrize("name", TYPES)
def test_bfloat16_is_as_close_as_one_process(name, tp, pool2, pool4, tmp_path_factory):
    """Guards: a reduction in less precision than the activations have, or a cast before a sum.

    Both are compared with the float32 model of the same rounded weights. More roundings than in one process there must be,
    one for each part of a sum: over three seeds, all types and both sizes the ratio of the errors was 0.91 to 1.26.
    """
    path, overrides = checkpoint(tmp_path_factory, name), EVERY_EXPERT.get(name, {})
    one = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **overrides)
    exact = measure_rounded(copy.deepcopy(one).float())
    rounded = measure_rounded(one)
    ranks = {2: pool2, 4: pool4}[tp].run(measure_rounded_sharded, path, **overrides)
    for figures in ranks:
        assert torch.dist(figures.logits, exact.logits) < 1.5 * torch.dist(rounded.logits, exact.logits)
    assert distance(ranks[0].gradients, exact.gradients) < 1.5 * distance(rounded.gradients, exact.gradients)


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
    """Between two models' gradients, each taken as one vector."""
    assert first.keys() == second.keys()
    return torch.stack([torch.dist(first[name], second[name]) for name in first]).norm()


def test_three_steps_of_adamw(pool2, tmp_path_factory):
    """Guards: gradients that are right and then clipped, or replicas updated, differently on each rank.

    Where a gradient is nearly zero AdamW divides noise by noise: 6e-5 was measured, at a learning rate of 1e-2.
    """
    path = checkpoint(tmp_path_factory, "llama")
    expected = train(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    actual = pool2.run(train_sharded, path)[0]
    assert actual.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(actual[name], parameter, atol=1e-3, rtol=0)
