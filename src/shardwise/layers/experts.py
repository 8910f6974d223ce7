"""Mixture-of-experts modules: every expert split over the ranks (tensor parallel), or every rank some experts (expert
parallel).

The experts' forward takes (hidden states (tokens, features), expert ids (tokens, k), routing weights (tokens, k)). Hidden
states and routing weights enter as R: each rank sees only its part of what follows, so both gradients are summed in backward,
the router's through the routing weights. The output is a part on every rank, and summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shardwise.collectives import copy_to_tp, gather_from_tp, reduce_from_tp, scatter_to_tp
from shardwise.layers.base import Cut, Local, ParallelStyle
from shardwise.layers.replicated import Replicate
from shardwise.layout import Layout, Shape


class MoeExpertsParallel(ParallelStyle):
    """Every rank computes its slice of every expert.  (X I, ids I, weights I) -> Y I."""

    prefix = "TensorParallel"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mesh = self._tp.mesh
        args = tuple(_enter(value, mesh) for value in args)
        kwargs = {name: _enter(value, mesh) for name, value in kwargs.items()}
        return _sum(self._local(*args, **kwargs), mesh, [*args, *kwargs.values(), *self._parameters.values()])

    @property
    def down_proj_bias(self) -> Tensor:
        """The bias of transformers' experts after which outputs are summed: where it is whole, only the first rank adds it.

        The others add zeros with the same gradient, so that the parameter and its gradient are alike on all ranks.
        """
        bias = self._parameters.get("down_proj_bias")
        if bias is None:
            raise AttributeError(f"{type(self).__name__} has no down_proj_bias")
        return bias if "down_proj_bias" in self._tp.sizes or self._tp.mesh.get_local_rank() == 0 else bias - bias.detach()

    def _local(self, *args: Any, **kwargs: Any) -> Any:
        """This rank's part of the output; all that is in `args` and `kwargs` is R."""
        return super().forward(*args, **kwargs)


class MoeIdentityExpert(ParallelStyle):
    """An expert that returns its input, inside experts whose outputs are summed: only the first rank contributes.  X R -> X
    P.
    """

    prefix = "Identity"

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(input, *args, **kwargs)
        return output if self._tp.mesh.get_local_rank() == 0 else torch.zeros_like(output)


class GroupedGemm(ParallelStyle):
    """For the stacked weights of experts: split over the experts, which is dim 0."""

    prefix = "GroupedGemm"

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        return Cut(spread=cut.spread).along(0)


class EpDispatchExperts(MoeExpertsParallel):
    """Every rank computes its own experts for all tokens, and the outputs are summed.  (X I, ids I, weights I) -> Y I.

    Ids of other ranks' experts become `num_experts` (local), which transformers' experts skip, with a routing weight of zero.
    """

    prefix = "ExpertParallel"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        return (
            None
            if hasattr(module, "num_experts")
            else f"{type(module).__name__} does not say how many experts it has (num_experts)"
        )

    @classmethod
    def local_attributes(cls, module: nn.Module, local: Local) -> dict[str, int | None]:
        attributes: dict[str, int | None] = {"num_experts": _stacked(module, local)}
        return attributes | ({"_is_expert_parallel": True} if hasattr(module, "_is_expert_parallel") else {})

    def _local(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any, **kwargs: Any) -> Any:
        name, sizes = next(iter(self._tp.sizes.items()))
        ids, elsewhere = self._tp.own(top_k_index, name)
        if getattr(self, "has_bias", False) and getattr(self.config, "_experts_implementation", "") == "eager":
            # The loop over experts with biases (gpt-oss) has no place for ids of others: it gets the rows of its own alone.
            tokens, slots = torch.where(~elsewhere)
            own = super()._local(hidden_states[tokens], ids[tokens, slots, None], top_k_weights[tokens, slots, None])
            return torch.zeros_like(hidden_states).index_add(0, tokens, own)
        ids = ids.masked_fill(elsewhere, sizes[self._tp.mesh.get_local_rank()])
        return super()._local(hidden_states, ids, top_k_weights.masked_fill(elsewhere, 0), *args, **kwargs)


class EpSortedExperts(ParallelStyle):
    """Experts that take all tokens for each expert, scaled by their routing weight: every rank takes the rows of its own
    experts, and the outputs are gathered.  X (experts x tokens, features) I -> Y (experts x tokens, features) I.
    """

    prefix = "ExpertParallel"

    @classmethod
    def local_attributes(cls, module: nn.Module, local: Local) -> dict[str, int | None]:
        return {"num_experts": _stacked(module, local)} if hasattr(module, "num_experts") else {}

    def forward(self, hidden_states: Tensor) -> Tensor:
        mesh, experts = self._tp.mesh, next(iter(self._tp.sizes.values()))
        rows = hidden_states.shape[0] // sum(experts)
        sizes = tuple(number * rows for number in experts)
        output: Tensor = super().forward(scatter_to_tp(hidden_states, mesh, 0, sizes))
        return gather_from_tp(output, mesh, 0, sizes)


class EpRouter(Replicate):
    """The router of expert-parallel experts: whole, and the same on every rank. The experts' own style does the dispatch."""

    prefix = "EpRouter"


def _stacked(module: nn.Module, local: Local) -> int:
    name = next(name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3)
    return local.shape(name)[0]


def _enter(value: Any, mesh: Any) -> Any:
    return copy_to_tp(value, mesh) if isinstance(value, Tensor) and value.is_floating_point() else value


def _sum(output: Any, mesh: Any, inputs: list[Any]) -> Any:
    if isinstance(output, tuple):
        return (_sum(output[0], mesh, inputs), *output[1:])
    if not output.requires_grad and torch.is_grad_enabled():
        # No token came here, so there is no graph: yet backward has to join the others' sums, and give the weights zeros.
        inputs = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        output = sum((value.narrow(0, 0, 0).sum() for value in inputs), output)
    return reduce_from_tp(output, mesh)
