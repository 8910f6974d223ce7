"""An optimizer's state as one process would have it, and each rank's part of that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.errors import ShardwiseError, describe
from shardwise.gathering import gather_to_first
from shardwise.model_state import ModelState, parallel_parts, row_of
from shardwise.rendezvous import meet
from shardwise.spec import ShardSpec

_Place = tuple[ModelState, ShardSpec]


def full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """The `state_dict` of the optimizer of the ordinary model: full tensors on the CPU of the first of the ranks that `model`
    lies on, None on the others. Collective.

    Args:
        model: a parallel model, or a module around one.
        optimizer: of its parameters; one that keeps numbers for each element, or for each parameter.

    Raises `ShardwiseError` for an optimizer that keeps something else of a parameter that is cut (Adafactor's sums over rows).
    """
    state, places = optimizer.state_dict(), _places(model)
    for axes in {part.ep for part, _ in parallel_parts(model)}:
        meet(axes, "full_optimizer_state")
    full: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        kept = state["state"].get(index)
        if kept is not None:
            full[index] = {key: _gather(places.get(parameter), parameter, key, value) for key, value in kept.items()}
    first = all(part.ep.get_local_rank() == 0 for part, _ in parallel_parts(model))
    return {**state, "state": full} if first else None


def load_full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, full: dict[str, Any]) -> None:
    """Load what `full_optimizer_state` gave, or an ordinary optimizer's `state_dict`, of which each rank keeps its part."""
    places, local = _places(model), {}
    parameters = list(_parameters(optimizer))
    for index, kept in full["state"].items():
        place = places.get(parameters[index])
        local[index] = {key: _cut(place, value) for key, value in kept.items()}
    optimizer.load_state_dict({**full, "state": local})


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    # `state_dict` counts them in this order.
    for group in optimizer.param_groups:
        yield from group["params"]


def _places(model: nn.Module) -> dict[nn.Parameter, _Place]:
    parts = parallel_parts(model)
    return {p: (state, row_of(state, name, p)) for state, part in parts for name, p in part.named_parameters()}


def _gather(place: _Place | None, parameter: nn.Parameter, key: str, value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    if place is None or not place[1].sharded or value.dim() == 0:
        return value.cpu()
    state, row = place
    if value.shape != parameter.shape:
        raise ShardwiseError(
            describe(
                f"The optimizer keeps {key!r} of shape {tuple(value.shape)} for {row.name}, a rank's part of {row.shape}.",
                either=[
                    "an optimizer that works element by element (AdamW, SGD, ...), or",
                    "do not save its state: save_only_model=True",
                ],
            )
        )
    return gather_to_first(row, value, state.axis_of(row))


def _cut(place: _Place | None, value: object) -> object:
    if place is None or not isinstance(value, Tensor) or not place[1].sharded or tuple(value.shape) != place[1].shape:
        return value
    state, row = place
    axis = state.axis_of(row)
    return row.layout.shard(value, axis.get_local_rank(), axis.size())
