"""A parallel style of our own, for norms of q and k: each rank's sees its own heads only, so that its gradient is a part."""

import torch.distributed as dist
from torch import Tensor

import shardwise


class SummedNorm(shardwise.ParallelStyle):
    """Sums the gradient over the ranks as soon as backward has left it in `.grad`."""

    prefix = "Summed"

    def forward(self, x: Tensor) -> Tensor:
        if self.training and "hook" not in self.__dict__:
            self.hook = self.weight.register_post_accumulate_grad_hook(self.sum_gradient)
        return super().forward(x)

    def sum_gradient(self, weight: Tensor) -> None:
        dist.all_reduce(weight.grad, group=self._tp.mesh.get_group())


shardwise.register_style("summed_norm", SummedNorm)
