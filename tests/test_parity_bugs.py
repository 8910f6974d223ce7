"""The checks of `test_parity.py` bite: each of these bugs is put back on the ranks, and the figures leave their tolerance."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig

import shardwise.layers.linear
import shardwise.layers.region
import shardwise.model
import shardwise.training.clip
from figures import Figures, gradient_error, measure_plain, measure_sharded
from models import checkpoint
from shardwise.collectives import reduce_from_tp
from shardwise.lockstep import Lockstep
from shardwise.spec import ShardSpec
from shardwise.testing import RankPool

# `shardwise.parallelize`, the attribute, is the function.
assignment = importlib.import_module("shardwise.parallelize")


def no_input_sum() -> contextlib.AbstractContextManager[object]:
    """Column-wise layers that do not sum their input's gradient."""
    return patch.object(shardwise.layers.region, "copy_to_tp", lambda x, mesh: x)


def bias_on_every_rank() -> contextlib.AbstractContextManager[object]:
    """Row-wise layers that add their bias before the sum."""

    def forward(self: shardwise.layers.RowwiseParallel, input: Tensor) -> Tensor:
        self._tp.leave()
        return reduce_from_tp(nn.functional.linear(input, self.weight, self.bias), self._tp.mesh)

    return patch.object(shardwise.layers.RowwiseParallel, "forward", forward)


def no_gradient_sum() -> contextlib.AbstractContextManager[object]:
    """Whole parameters with partial gradients, left at that."""
    return patch.object(assignment, "sums_gradient", lambda row, size, ep_size: False)


@contextlib.contextmanager
def sum_of_accumulated_gradients() -> Iterator[None]:
    """The sum made over `.grad` after each backward, and so over what earlier ones left there."""
    assign = assignment._parallelize_module

    def hooked(module, row, state, region):
        assign(module, row, state, region)
        for name, parameter in module.named_parameters(recurse=False):
            if state.plan[f"{row.name}.{name}"].partial:
                parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))

    with no_gradient_sum(), patch.object(assignment, "_parallelize_module", hooked):
        yield


def norm_of_everything() -> contextlib.AbstractContextManager[object]:
    """A norm to which every rank adds all that it holds."""
    return patch.object(shardwise.training.clip, "_counted", _all_of)


def _all_of(row: ShardSpec, gradient: Tensor, state: object) -> Iterator[Tensor]:
    yield gradient


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """Ranks that sample for themselves, and don't look at each other's inputs, which would tell."""
    with patch.object(shardwise.model, "same_random_state", lambda mesh: None), patch.object(Lockstep, "is_due", never):
        yield


def never(*_: object) -> bool:
    """No call is one to look at."""
    return False


def measure_with(bug: Callable[[], contextlib.AbstractContextManager[object]], path: Path) -> Figures:
    """On every rank: the figures under a bug."""
    with bug():
        return measure_sharded(path)


@pytest.fixture
def both(pool2: RankPool, tmp_path_factory) -> Callable[..., tuple[Figures, list[Figures]]]:
    """The plain model's figures, and those of two ranks under a bug."""

    def run(name, bug):
        path = checkpoint(tmp_path_factory, name)
        return measure_plain(path), pool2.run(measure_with, bug, path)

    return run


def test_input_gradient_left_partial(both):
    """Guards the gradient check. Forward is the same, so only the gradients may tell."""
    expected, ranks = both("llama", no_input_sum)
    torch.testing.assert_close(ranks[0].logits, expected.logits, atol=1e-4, rtol=0)
    assert gradient_error(ranks[0].gradients[0], expected.gradients[0]) > 0.1


def test_bias_added_by_every_rank(both):
    """Guards the logits check."""
    expected, ranks = both("starcoder2", bias_on_every_rank)
    assert max((a - b).abs().max() for a, b in zip(ranks[0].logits, expected.logits, strict=True)) > 1e-2


def test_norm_gradient_left_partial(both):
    """Guards the gradient check and the one of replicas: q and k norms see only this rank's heads."""
    expected, ranks = both("qwen3", no_gradient_sum)
    assert gradient_error(ranks[0].gradients[0], expected.gradients[0]) > 0.1
    first, second = (figures.held_in_common for figures in ranks)
    assert {name for name in first if not torch.equal(first[name], second[name])} == {
        f"model.layers.{layer}.self_attn.{norm}.weight" for layer in (0, 1) for norm in ("q_norm", "k_norm")
    }


def test_accumulated_gradient_summed(both):
    """Guards the check with several micro-batches: with one, this bug does not show."""
    expected, ranks = both("qwen3", sum_of_accumulated_gradients)
    errors = [gradient_error(*pair) for pair in zip(ranks[0].gradients, expected.gradients, strict=True)]
    assert errors[0] < 1e-3 < 0.1 < errors[1] < errors[2]


def test_norm_that_counts_replicas_twice(both):
    """Guards the check of the norm, whose tolerance is 1e-5: few of the parameters are replicated, so it must be small."""
    expected, ranks = both("starcoder2", norm_of_everything)
    assert (ranks[0].norms["euclidean"] / expected.norms["euclidean"] - 1).abs() > 1e-3


def test_ranks_that_sample_for_themselves(both):
    """Guards the check of sampled tokens, which differ from the second rank on; greedy ones do not."""
    expected, ranks = both("llama", own_random_state)
    assert torch.equal(ranks[0].greedy, expected.greedy)
    assert torch.equal(ranks[1].greedy, expected.greedy)
    assert not torch.equal(ranks[1].sampled, expected.sampled)


def test_fused_weight_cut_straight_through(pool2, tmp_path_factory):
    """Guards the logits check: rank 0 with all of the gates, rank 1 with all of what they gate."""
    path = checkpoint(tmp_path_factory, "phi3")
    expected = measure_plain(path)
    plan = shardwise.plan(AutoConfig.from_pretrained(path), 2, {"layers.*.mlp.gate_up_proj": "colwise"})  # rules are tried out
    actual = pool2.run(measure_sharded, path, tp_plan=plan)[0]
    assert max((a - b).abs().max() for a, b in zip(actual.logits, expected.logits, strict=True)) > 1e-2
