"""Norms whose features are split over the ranks: outputs and every gradient beside one process."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import shardwise
from blocks import check_parity, randomize, tp_axis, x
from shardwise.errors import PlanError, ShardwiseError
from shardwise.testing import RankError

WIDTH = 12
NOISE = 1e-4
"""Models' norms compute in float32, 1e-7 of each term; statistics of the local features are off by some percent."""
PLAN = {"up": "colwise", "norm": "sharded_norm", "down": "rowwise"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Normed(nn.Module):
    """A norm over the width of an MLP, gated by its features or not."""

    def __init__(self, norm: nn.Module, gated: bool = False) -> None:
        super().__init__()
        self.up, self.norm, self.down, self.gated = nn.Linear(6, WIDTH), norm, nn.Linear(WIDTH, 5), gated

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        return self.down(self.norm(inner, torch.tanh(inner)) if self.gated else self.norm(inner))


class Spread(nn.Module):
    """A norm by the deviation, which is unbiased or not."""

    def __init__(self, unbiased: bool) -> None:
        super().__init__()
        self.weight, self.unbiased = nn.Parameter(torch.ones(WIDTH)), unbiased

    def forward(self, x: Tensor) -> Tensor:
        spread = x.std(dim=-1, keepdim=True, unbiased=self.unbiased) + x.var(-1, keepdim=True, correction=0)
        return self.weight * (x - x.mean(-1, keepdim=True)) / spread


class Longest(nn.Module):
    """A norm by a statistic that no mean is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.norm(dim=-1, keepdim=True)


class Plain(Longest):
    """No norm at all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * silu(x)


NORMS = {
    "nn.LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "nn.LayerNorm without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "nn.RMSNorm": lambda: nn.RMSNorm(WIDTH, eps=1e-3),
    "of a model": lambda: Olmo2RMSNorm(WIDTH, eps=1e-3),
    "deviation": lambda: Spread(unbiased=False),
    "unbiased deviation": lambda: Spread(unbiased=True),
}
GROUPED = {
    "group_size": lambda groups: BambaRMSNormGated(WIDTH, group_size=WIDTH // groups, eps=1e-3),
    "n_groups": lambda groups: FalconH1RMSNormGated(WIDTH, n_groups=groups, eps=1e-3, norm_before_gate=False),
}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_statistics_are_those_of_all_features(norm, size, threads):
    """Guards: a mean over the rank's own features; its gradient not summed, or summed twice; the weight's gradient of the
    wrong features; from the second micro-batch on, the first counted again.
    """
    check_parity(threads, size, randomize(Normed(NORMS[norm]())), PLAN, (x(2, 3, 6),), (x(2, 3, 6),), tolerance=NOISE)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("norm", GROUPED)
def test_groups(norm, size, groups, threads):
    """Guards: a group that two ranks share normed by each of them alone; ranks of different groups summed together; the code
    of the norm reading how many groups there are, or how large they are, of all ranks.
    """
    batches = [(x(2, 3, 6),), (x(2, 3, 6),)]
    check_parity(threads, size, randomize(Normed(GROUPED[norm](groups), gated=True)), PLAN, *batches, tolerance=NOISE)


def test_uneven_shares(threads):
    """Guards: the mean of the ranks' means, which is another one where they have different numbers of features."""
    check_parity(threads, 5, randomize(Normed(Olmo2RMSNorm(WIDTH, eps=1e-3))), PLAN, (x(2, 3, 6),), tolerance=NOISE)


def test_groups_that_do_not_fit_are_refused(threads):
    """Guards: a rank with one group and a half, whose features would be normed in other groups than the model's."""
    with pytest.raises(RankError, match="groups of 6 features, and the ranks' features start at 0, 4, 8") as caught:
        check_parity(threads, 3, randomize(Normed(GROUPED["group_size"](2), gated=True)), PLAN, (x(2, 3, 6),))
    assert isinstance(caught.value.__cause__, PlanError)


@pytest.mark.parametrize(("kind", "said"), [(Longest, "norm over features that are split"), (Plain, "takes no mean")])
def test_other_statistics_are_refused(kind, said, threads):
    """Guards: a statistic of the local features taken for that of all, without a word."""
    with pytest.raises(RankError, match=said) as caught:
        check_parity(threads, 2, randomize(Normed(kind())), PLAN, (x(2, 3, 6),))
    assert isinstance(caught.value.__cause__, ShardwiseError)


def test_half_precision_is_rounded_once(threads):
    """Guards: a sum over ranks in bfloat16: with 12 features its mean of squares is off by up to 2 ** -9 of itself, and float32
    rounds to the very bits of one process but for ties.
    """
    model = randomize(Normed(nn.LayerNorm(WIDTH))).bfloat16()
    data = x(64, 6).bfloat16()
    inner = model.up(data)
    expected = nn.functional.layer_norm(inner.float(), (WIDTH,), model.norm.weight.float(), model.norm.bias.float())

    def on_rank() -> Tensor:
        local = copy.deepcopy(model)
        shardwise.parallelize(local, tp_axis(), PLAN)
        return local.norm(local.up(data)).detach()

    found = torch.cat(threads(on_rank, 2), -1)
    assert (found.float() - expected).abs().max() <= 2**-8 * expected.abs().max()


def compiled() -> tuple[Tensor, Tensor]:
    """On every rank: what a norm computes in eager code, and compiled as one graph."""
    torch.manual_seed(0)
    model = randomize(Normed(BambaRMSNormGated(WIDTH, group_size=WIDTH, eps=1e-3), gated=True))
    shardwise.parallelize(model, tp_axis(), PLAN)
    data = x(2, 3, 6)
    return model(data).detach(), torch.compile(model, backend="eager", fullgraph=True)(data).detach()


def test_compiled(pool2):
    """Guards: statistics that a compiler does not see summed, or cannot trace."""
    for eager, traced in pool2.run(compiled):
        torch.testing.assert_close(eager, traced)
