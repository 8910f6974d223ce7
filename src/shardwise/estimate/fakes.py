"""What fake tensors can't do by themselves: products of experts in other dtypes than bfloat16, and rows dealt to experts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.collectives import Sizes, even_sizes
from shardwise.hf import unpacked_sequences
from shardwise.layers.dispatch import Dispatch, Route


class GroupedProducts(TorchDispatchMode):
    """Gives grouped matrix products their shape: torch's own rule for fake tensors knows bfloat16 alone, its kernels more."""

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every operator comes by here."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return grouped_product(*args, **kwargs)
        return func(*args, **kwargs)


def grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """An empty tensor of the shape of `torch._grouped_mm(a, b, offs)`: of matrices, or of rows of matrices at `offs`."""
    rows, columns = a.shape[-2], b.shape[-1]
    groups = offs.shape if offs is not None and a.dim() == b.dim() == 2 else a.shape[:-2] if b.dim() == a.dim() else ()
    return a.new_empty((*groups, rows, columns), dtype=out_dtype or a.dtype)


@contextmanager
def fakes() -> Iterator[None]:
    """In the block every tensor is a fake one, of a shape and without memory, and tokens that travel go to all ranks evenly.

    What an operator can't do with fake ones is raised, and not logged besides.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), GroupedProducts(), evenly(), unpacked_sequences():
            yield
    finally:
        logger.disabled = disabled


@contextmanager
def evenly() -> Iterator[None]:
    """In the block, tokens that travel go to all ranks evenly: where they go is read on the host, and fake ones don't say."""
    before = Dispatch.route, Dispatch.tokens
    Dispatch.route, Dispatch.tokens = _even_route, _same_tokens  # type: ignore[method-assign]
    try:
        yield
    finally:
        Dispatch.route, Dispatch.tokens = before  # type: ignore[method-assign]


def _even_route(self: Dispatch, ids: Tensor) -> Route:
    ranks, mine = self.ep.size(), self.experts[self.ep.get_local_rank()]
    counts = torch.zeros(sum(self.experts), dtype=torch.long)
    received = torch.empty(ranks * mine, dtype=torch.long)
    dist.all_to_all_single(received, counts, [mine] * ranks, list(self.experts), group=self.ep.get_group())
    send = even_sizes(ids.numel(), ranks)
    receive = (send[self.ep.get_local_rank()],) * ranks
    return Route(torch.arange(ids.numel()), torch.zeros(sum(receive), 1, dtype=torch.long), send, receive)


def _same_tokens(self: Dispatch, every: Tensor) -> Sizes:
    return (every.shape[1],) * self.ep.size()
