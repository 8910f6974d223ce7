"""Expert parallelism that moves tokens: each goes to the ranks that hold its experts, and its results come back.

Ranks that share their tokens (the tp axis) each take a slice of them, so that no token is computed twice. Every (token, expert)
pair of a slice travels by one all-to-all to the expert's rank and back by another (GShard, Lepikhin et al. 2020,
arXiv:2006.16668); there it is weighted and summed, and the slices are put together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.collectives import Sizes, all_to_all, even_sizes, gather_from_tp, scatter_to_tp

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Dispatch:
    """How tokens travel to experts.

    Args:
        experts: how many experts each rank of `ep` holds, in the order of their ids.
        ep: the ranks that hold the experts.
        tp: the ranks that hold the same tokens.
    """

    experts: Sizes
    ep: DeviceMesh
    tp: DeviceMesh

    def __call__(self, compute: Compute, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The experts' weighted outputs, summed for each token. Collective.

        Args:
            compute: this rank's experts: (rows, features), (rows, 1) local ids, (rows, 1) weights -> (rows, features).
            hidden: (tokens, features), the same on the ranks of `tp`.
            ids: (tokens, k) int64, of all experts; one that no rank holds adds nothing.
            weights: (tokens, k).

        Returns (tokens, features) in the dtype of `hidden`.
        """
        share = even_sizes(hidden.shape[0], self.tp.size())
        if self.tp.size() > 1:
            hidden, ids, weights = (scatter_to_tp(x, self.tp, 0, share) for x in (hidden, ids, weights))
        route = self.route(ids)
        rows = all_to_all(hidden[route.order // ids.shape[1]], self.ep, route.receive, route.send)
        results = compute(rows, route.local_ids, torch.ones_like(route.local_ids, dtype=weights.dtype))
        back = all_to_all(results, self.ep, route.send, route.receive)
        pairs = back.new_zeros(ids.numel(), back.shape[-1]).index_copy(0, route.order, back)
        output = (pairs.view(*ids.shape, back.shape[-1]) * weights[..., None]).sum(1).to(hidden.dtype)
        return gather_from_tp(output, self.tp, 0, share) if self.tp.size() > 1 else output

    def sorted_rows(self, compute: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """The outputs of experts that take every token, in rows sorted by expert. Collective.

        Args:
            compute: this rank's experts: (experts x rows, features) -> the same shape.
            rows: (experts x tokens, features), the same on the ranks of `tp`.
        """
        every = rows.unflatten(0, (sum(self.experts), -1))
        share = even_sizes(every.shape[1], self.tp.size())
        every = scatter_to_tp(every, self.tp, 1, share)
        mine, tokens = self.experts[self.ep.get_local_rank()], self.tokens(every)
        send = tuple(number * every.shape[1] for number in self.experts)
        receive = tuple(mine * number for number in tokens)
        here = all_to_all(every.flatten(0, 1), self.ep, receive, send).split(receive)
        joined = torch.cat([part.unflatten(0, (mine, -1)) for part in here], 1)
        results = compute(joined.flatten(0, 1)).view_as(joined).split(tokens, 1)
        back = all_to_all(torch.cat([part.flatten(0, 1) for part in results]), self.ep, send, receive)
        return gather_from_tp(back.view_as(every), self.tp, 1, share).flatten(0, 1)

    def tokens(self, every: Tensor) -> Sizes:
        """How many tokens each rank of `ep` has. Collective."""
        numbers = torch.full((self.ep.size(),), every.shape[1], device=every.device)
        received = torch.empty_like(numbers)
        dist.all_to_all_single(received, numbers, group=self.ep.get_group())
        return tuple(received.tolist())

    def route(self, ids: Tensor) -> Route:
        """Where each pair of this rank's slice goes. Collective; the host waits for the answer."""
        experts, mine = sum(self.experts), self.experts[self.ep.get_local_rank()]
        flat = ids.flatten()
        flat = flat.where((flat >= 0) & (flat < experts), experts)  # those that travel nowhere come last
        counts = torch.bincount(flat, minlength=experts + 1)[:experts]
        received = counts.new_empty(self.ep.size() * mine)
        dist.all_to_all_single(received, counts, [mine] * self.ep.size(), list(self.experts), group=self.ep.get_group())
        send = torch.stack([part.sum() for part in counts.split(self.experts)])
        receive = received.view(self.ep.size(), mine).sum(1)
        # The one place where the host waits for the device: all-to-all takes its sizes from the host.
        sizes = torch.stack([send, receive]).tolist()
        local = torch.arange(mine, device=ids.device).repeat(self.ep.size())
        order = flat.argsort(stable=True)[: sum(sizes[0])]
        return Route(order, local.repeat_interleave(received, output_size=sum(sizes[1]))[:, None], *map(tuple, sizes))


@dataclass(frozen=True, slots=True)
class Route:
    """Where the pairs of one slice go: `order` has the places of those that travel, sorted by expert."""

    order: Tensor
    local_ids: Tensor
    send: Sizes
    receive: Sizes
