"""Mixture-of-experts modules: every expert split over the ranks (tensor parallel), or every rank some experts (expert
parallel).

The experts' forward takes (hidden states (tokens, features), expert ids (tokens, k), routing weights (tokens, k)). Hidden
states and routing weights enter as R: each rank sees only its part of what follows, so both gradients are summed in backward,
the router's through the routing weights. The output is a part on every rank, and summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shardwise.collectives import Sizes, copy_to_tp, even_sizes, gather_from_tp, reduce_from_tp, scatter_to_tp
from shardwise.errors import ShardwiseError, describe
from shardwise.layers.base import Cut, Local, ParallelStyle, ShardState
from shardwise.layers.dispatch import Dispatch
from shardwise.layers.replicated import Replicate
from shardwise.layout import Layout, Shape

ALIGNED = 8
"""Rows of stacked matrices are cut in so many at once: grouped products want whole 16 bytes, 8 elements of two bytes."""


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
    axis = "ep"

    @classmethod
    def layout(cls, shape: Shape, cut: Cut) -> Layout:
        # Of three dims the first are the experts; of two, a rule says how many rows an expert has.
        return Cut(unit=cut.unit if len(shape) == 2 else 1, spread=cut.spread).along(0)


class ExpertParallel(ParallelStyle):
    """Base of the styles of modules that hold whole experts, each rank some of them."""

    prefix = "ExpertParallel"
    axis = "ep"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        says = hasattr(module, "num_experts") or any(p.dim() == 3 for p in module.parameters(recurse=False))
        return None if says else f"{type(module).__name__} does not say how many experts it has (num_experts)"

    @classmethod
    def options(cls, module: nn.Module, parent: nn.Module) -> dict[str, int]:
        return {"experts": _number(module)}

    @classmethod
    def local_attributes(cls, module: nn.Module, local: Local) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        if hasattr(module, "num_experts"):
            found["num_experts"] = even_sizes(_number(module), local.size)[local.rank]
        return found | ({"_is_expert_parallel": True} if hasattr(module, "_is_expert_parallel") else {})

    def extra_repr(self) -> str:
        return f"{self._experts[self._tp.mesh.get_local_rank()]} of {sum(self._experts)} experts, ep={self._tp.mesh.size()}"

    @property
    def _experts(self) -> Sizes:
        """How many experts each rank holds."""
        return even_sizes(self._tp.options["experts"], self._tp.mesh.size())

    @property
    def _dispatch(self) -> Dispatch:
        return Dispatch(self._experts, self._tp.mesh, self._tp.tp)

    def _compute(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """This rank's experts: (rows, features), (rows, k) local ids, (rows, k) weights -> (rows, features)."""
        if self._tp.batches > 1:
            with self._averaged() as averaged:
                return _joined(self._rows(hidden, ids, weights), [hidden, weights, *averaged])
        return _connected(self._rows(hidden, ids, weights), [hidden, weights, *self.parameters()])

    def _rows(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        output: Tensor = super().forward(hidden, ids, weights) if hidden.shape[0] else torch.zeros_like(hidden)
        return output.reshape(hidden.shape)

    @contextmanager
    def _averaged(self) -> Iterator[list[Tensor]]:
        """Where the ranks compute several batches: all parameters, such that their gradients are averaged, which all ranks
        have to do alike, whatever tokens came. Some experts read those of a module inside.
        """
        _refuse_averaging(self)
        modules = [module for module in self.modules() if "_tp" in module.__dict__]
        states: list[ShardState] = [module.__dict__["_tp"] for module in modules]
        for state in states:
            state.summed = {}
        try:
            yield [getattr(module, name) for module, state in zip(modules, states, strict=True) for name in state.sizes]
        finally:
            for state in states:
                state.summed = None


class EpAllToAllExperts(ExpertParallel):
    """Every token goes to the ranks of its experts, and the results come back.  (X I, ids I, weights I) -> Y I.

    See `shardwise.layers.dispatch`. The sizes of the exchange are read on the host, so `torch.compile` breaks its graph here.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens = hidden_states.flatten(0, -2)
        return self._dispatch(self._compute, tokens, top_k_index, top_k_weights).view_as(hidden_states)


class EpDispatchExperts(EpAllToAllExperts):
    """Every rank computes its own experts, in one of two ways.  (X I, ids I, weights I) -> Y I.

    Where all ranks have the same tokens, each computes its experts for all of them, and the outputs are summed: one all-reduce,
    and no size that depends on the routing. Ids of other ranks' experts become `num_experts` (local), which transformers'
    experts skip, with a routing weight of zero. Where experts are dealt to ranks with different tokens, tokens travel.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        mesh = self._tp.mesh
        if self._tp.batches > 1:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        hidden, weights = copy_to_tp(hidden_states.flatten(0, -2), mesh), copy_to_tp(top_k_weights, mesh)
        return reduce_from_tp(self._own(hidden, top_k_index, weights), mesh).view_as(hidden_states)

    def _own(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rank = self._tp.mesh.get_local_rank()
        ids, number = ids - sum(self._experts[:rank]), self._experts[rank]
        elsewhere = (ids < 0) | (ids >= number)
        if not _loops(self):
            return self._compute(hidden, ids.masked_fill(elsewhere, number), weights.masked_fill(elsewhere, 0))
        # Not every loop over the experts has a place for ids of others: it gets the rows of its own alone.
        tokens, slots = torch.where(~elsewhere)
        rows = self._compute(hidden[tokens], ids[tokens, slots, None], weights[tokens, slots, None])
        return torch.zeros_like(hidden, dtype=rows.dtype).index_add(0, tokens, rows)


class EpSortedExperts(ExpertParallel):
    """Experts that take all tokens for each expert, scaled by their routing weight: every rank takes the rows of its own
    experts, and the outputs are gathered.  X (experts x tokens, features) I -> Y (experts x tokens, features) I.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self._tp.batches > 1:
            return self._dispatch.sorted_rows(super().forward, hidden_states)
        mesh, experts = self._tp.mesh, self._experts
        rows = hidden_states.shape[0] // sum(experts)
        sizes = tuple(number * rows for number in experts)
        output: Tensor = super().forward(scatter_to_tp(hidden_states, mesh, 0, sizes))
        return gather_from_tp(output, mesh, 0, sizes)


class EpRouter(Replicate):
    """The router of expert-parallel experts: whole, and the same on every rank. The experts' own style does the dispatch."""

    prefix = "EpRouter"


def _number(module: nn.Module) -> int:
    """How many experts a module has in all."""
    number = getattr(module, "num_experts", None)
    return number if isinstance(number, int) else next(p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3)


def _refuse_averaging(experts: nn.Module) -> None:
    """Raise `ShardwiseError` when DDP holds these experts for the same on all replicas: it made them the first replica's.

    A parallel model tells DDP by an attribute, which is not seen where DDP wraps a module around the model.
    """
    ddp = None if torch.compiler.is_compiling() else DistributedDataParallel._get_active_ddp_module()
    held = {id(parameter) for parameter in getattr(ddp, "_module_parameters", ())}
    if any(id(parameter) in held for parameter in experts.parameters()):
        raise ShardwiseError(
            describe(
                "DistributedDataParallel has made the dealt experts of all replicas those of the first one.",
                why="it was given a module around the parallel model, and does not know that replicas hold other experts",
                either=[
                    "load again, and wrap the parallel model itself: DistributedDataParallel(model), or",
                    "before that, give the outer module model._ddp_params_and_buffers_to_ignore, names prefixed with the path",
                ],
            )
        )


def _loops(experts: nn.Module) -> bool:
    """Whether transformers computes `experts` in a loop of their own code, and not by one product for all."""
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    return not hasattr(experts, "has_bias") or implementation in (None, "eager")


def _enter(value: Any, mesh: Any) -> Any:
    return copy_to_tp(value, mesh) if isinstance(value, Tensor) and value.is_floating_point() else value


def _sum(output: Any, mesh: Any, inputs: list[Any]) -> Any:
    if isinstance(output, tuple):
        return (_sum(output[0], mesh, inputs), *output[1:])
    return reduce_from_tp(_connected(output, inputs), mesh)


def _connected(output: Tensor, inputs: list[Any]) -> Tensor:
    """`output`, part of the graph of `inputs` also where no token came, so that nothing was computed from them: backward has to
    join the others' collectives, and give the weights zeros.
    """
    return output if output.requires_grad else _joined(output, inputs)


def _joined(output: Tensor, inputs: list[Any]) -> Tensor:
    """`output`, whose backward reaches every one of `inputs`."""
    if not torch.is_grad_enabled():
        return output
    inputs = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    return sum((value.narrow(0, 0, 0).sum() for value in inputs), output)
