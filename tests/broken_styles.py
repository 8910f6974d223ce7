"""Parallel styles with a fault each, which the tests of `shardwise.verify` give to plans."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

import shardwise
from shardwise.collectives import reduce_from_tp
from shardwise.layers import ColwiseGatherOutput, ColwiseParallel, Replicate, RowwiseParallel


class BiasOnEveryRank(RowwiseParallel):
    """The bias goes into the sum."""

    def forward(self, input: Tensor) -> Tensor:
        self._tp.leave()
        weight = self.weight.T if self._tp.transposed else self.weight
        return reduce_from_tp(linear(input, weight, self._parameters["bias"]), self._tp.mesh)


class NotSummed(RowwiseParallel):
    """Every rank goes on with its part."""

    def forward(self, input: Tensor) -> Tensor:
        self._tp.leave()
        return linear(input, self.weight)


class SummedTwice(RowwiseParallel):
    """The sum is summed again."""

    def forward(self, input: Tensor) -> Tensor:
        return reduce_from_tp(super().forward(input) * 1.0, self._tp.mesh)


class Averaged(RowwiseParallel):
    """A mean over the ranks."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / self._tp.mesh.size()


class InputNotSummed(ColwiseParallel):
    """The gradient of the input is left as it is on each rank."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class GatheredBackwards(ColwiseGatherOutput):
    """The ranks' parts, the last rank's first."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat(super().forward(input).chunk(self._tp.mesh.size(), -1)[::-1], -1)


class AccumulatedSum(Replicate):
    """The gradient is summed in `.grad`, after each backward: what earlier ones left there too."""

    def forward(self, *args: object, **kwargs: object) -> object:
        if not self.__dict__.get("hooked"):
            self.__dict__["hooked"] = True
            for parameter in self.parameters(recurse=False):
                parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
        return super().forward(*args, **kwargs)


STYLES = {
    "bias_on_every_rank": BiasOnEveryRank,
    "not_summed": NotSummed,
    "summed_twice": SummedTwice,
    "averaged": Averaged,
    "input_not_summed": InputNotSummed,
    "gathered_backwards": GatheredBackwards,
    "accumulated_sum": AccumulatedSum,
}
for name, style in STYLES.items():
    shardwise.register_style(name, style)
