"""The styles of mixers: a product in the middle of local channels, and a mixer that would multiply past its modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from blocks import check_parity, randomize, under, x


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Selective(nn.Module):
    """Channels that read a product of all of them, as a whole and through a norm and a second product (Mamba's step sizes)."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.inner, self.norm = nn.Linear(6, 7), nn.Linear(7, 4, bias), nn.LayerNorm(4)
        self.spread, self.down = nn.Linear(4, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        common = self.inner(hidden)
        return self.down(hidden * self.spread(self.norm(common)).tanh() * common.sum(-1, keepdim=True))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_rowwise_inner(bias, size, threads):
    """Guards: outputs whose gradient is that of the rank's own channels alone; the bias's likewise, or summed twice."""
    summed = {"norm": "replicated_with_grad_allreduce", "spread": "local_rows"}
    plan = {"up": "colwise", "inner": "rowwise_inner", **summed, "down": "rowwise"}
    check_parity(threads, size, randomize(Selective(bias)), plan, (x(2, 3, 6),), (x(2, 3, 6),))


class Fused(nn.Module):
    """A mixer that in training multiplies by its output projection's weight itself, and by a weight inside of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale, self.down = nn.Linear(6, 8), nn.LayerNorm(2, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).unflatten(-1, (-1, 2)).mul(self.scale.weight).flatten(-2).tanh()
        if self.training:
            return nn.functional.linear(hidden, self.down.weight, self.down.bias)
        return self.down(hidden)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_unfused_mixer(training, size, threads):
    """Guards: a fused kernel's product with the local columns of a weight taken for the whole, the sum over the ranks lost; the
    gradient of a child's parameter that the mixer reads itself; a module that is not training any more afterwards.
    """
    model = randomize(nn.Sequential(Fused())).train(training)
    plan = under("0", {"up": "colwise", "scale": "replicated_with_grad_allreduce", "down": "rowwise"}) | {"0": "unfused_mixer"}
    check_parity(threads, size, model, plan, (x(2, 3, 6),), (x(2, 3, 6),))
    assert model[0].training is training
