"""The gradient norm of a sharded model: the one that one process would compute, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.errors import ShardwiseError, describe
from shardwise.mesh import local_device
from shardwise.model_state import ModelState, check_summed, parallel_parts, refuse_part, row_of
from shardwise.spec import ShardSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, for a model that lies on several ranks. Collective.

    Each element of the full gradient counts once: of a parameter that every rank keeps only one rank's gradient is counted,
    of KV heads that some ranks share one of these ranks'. Every rank scales by the same number.

    Args:
        model: a parallel model, or a module around one: parameters outside (a value head) must be the same on every rank. An
            ordinary model is clipped by torch's own function.
        max_norm: the largest norm that is left as it is.
        norm_type: the p of the p-norm, or infinity.
        error_if_nonfinite: raise `RuntimeError`, on every rank, when the norm is not finite.
        foreach: use torch's fused implementation for scaling; None chooses.

    Returns the norm before clipping, a scalar in float32 (float64 for float64 gradients), bitwise the same on every rank.
    Raises `ShardwiseError` for parameters in place of the model.
    """
    if not isinstance(model, nn.Module):
        raise ShardwiseError(
            describe(
                f"clip_grad_norm_: the model is needed, not {type(model).__name__}: parameters don't say how they are cut.",
                fix="shardwise.clip_grad_norm_(model, max_norm)",
            )
        )
    parts = list(parallel_parts(model))
    if not parts:
        refuse_part(model)
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type, error_if_nonfinite, foreach)
    state = _common_axes(model, [state for state, _ in parts])
    for own, part in parts:
        check_summed(own, part)
    rows = {p: row_of(state, name, p) for state, part in parts for name, p in part.named_parameters()}
    gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
    precision = torch.float64 if any(g.dtype == torch.float64 for g in gradients.values()) else torch.float32
    norms = []
    for axis in (state.mesh, state.ep) if state.ep.size() > state.mesh.size() else (state.mesh,):
        here = {p: g for p, g in gradients.items() if (state.axis_of(rows[p]) if p in rows else state.mesh) is axis}
        counted = [part.to(precision) for p, gradient in here.items() for part in _counted(rows.get(p), gradient, axis)]
        norms.append(_norm(counted, norm_type, axis, precision))
    total = norms[0] if len(norms) == 1 else torch.stack(norms).norm(norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"The total norm of order {norm_type} of the gradients is not finite, so they cannot be clipped: {total.item()}."
        )
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, total, foreach)
    return total


def _common_axes(model: nn.Module, states: list[ModelState]) -> ModelState:
    if any((state.mesh, state.ep) != (states[0].mesh, states[0].ep) for state in states):
        raise ShardwiseError(
            describe(
                f"{type(model).__name__} has parallel models on different axes, whose gradients have no common norm.",
                either=["clip each by itself"],
            )
        )
    return states[0]


def _counted(row: ShardSpec | None, gradient: Tensor, mesh: DeviceMesh) -> Iterator[Tensor]:
    """The parts of this rank's gradient that no earlier rank holds too; of a parameter outside the plan, every rank has all."""
    rank, size = mesh.get_local_rank(), mesh.size()
    cut = row.layout.cut(row.shape) if row is not None else None
    if row is None or cut is None:
        if rank == 0:
            yield gradient
        return
    earlier = (
        {piece.full.start for before in range(rank) for piece in row.layout.pieces(row.shape, before, size)}
        if row.layout.copies(row.shape, size) > 1
        else set()
    )
    if not earlier:
        yield gradient
        return
    for piece in row.layout.pieces(row.shape, rank, size):
        if piece.full.start not in earlier:
            yield gradient.narrow(cut[0], piece.local.start, piece.local.stop - piece.local.start)


def _norm(counted: list[Tensor], p: float, mesh: DeviceMesh, precision: torch.dtype) -> Tensor:
    """The norm of what the ranks of `mesh` count together."""
    none = torch.zeros((), dtype=precision, device=local_device(mesh))  # on some ranks nothing counts
    norms = torch.stack(torch._foreach_norm([none, *counted], p))
    if math.isinf(p):
        largest = norms.max()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.get_group())
        return largest
    powers = norms.pow(p).sum()
    dist.all_reduce(powers, group=mesh.get_group())
    return powers.pow(1 / p)
