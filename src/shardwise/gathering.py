"""Full tensors from the shards that the ranks hold: gathered one at a time, in the ordinary names."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.layers import gather_whole
from shardwise.mesh import local_device, point_to_point_device
from shardwise.model_state import ModelState, check_summed, plain_name, required_state, row_of, state_of
from shardwise.rendezvous import meet
from shardwise.replicas import check_same
from shardwise.spec import ShardSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict of the ordinary model: full tensors on the CPU of the first of the ranks that it lies on, None on the
    others.

    Collective: every rank of the tp axis must call it, or, where experts are dealt to more ranks, each of these; raises
    `MissingRankError` when one does not. Tied parameters stand under each of their names, as one tensor; buffers that are not
    persistent are left out, as `nn.Module.state_dict` does. Of an ordinary model, its own state dict.
    """
    named: dict[str, Tensor] = model.state_dict(keep_vars=True)
    state = state_of(model)
    if state is None:
        return {name: tensor.detach().cpu() for name, tensor in named.items()}
    meet(state.ep, "full_state_dict")
    check_dtypes(state, named, "full_state_dict")
    return _gather_all(state, named)


def full_gradients(model: nn.Module) -> dict[str, Tensor] | None:
    """The gradients of the ordinary model by parameter name, as `full_state_dict` gives the parameters.

    Collective, as that is. A parameter that has no gradient on any rank is left out; where only some
    ranks have one (experts that got no token elsewhere), the others count as zero.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    state = state_of(model)
    if state is None:
        return {name: p.grad.detach().cpu() for name, p in named.items() if p.grad is not None}
    check_summed(state, model)
    meet(state.ep, "full_gradients")
    check_dtypes(state, named, "full_gradients")
    has = torch.tensor([p.grad is not None for p in named.values()], dtype=torch.int32, device=local_device(state.mesh))
    dist.all_reduce(has, group=state.ep.get_group())
    present = [(name, p) for (name, p), count in zip(named.items(), has.tolist(), strict=True) if count]
    return _gather_all(state, {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in present})


def check_dtypes(state: ModelState, named: Mapping[str, Tensor], what: str) -> None:
    """Raise `MismatchError`, on every rank, where a tensor has another dtype on one of them (`model.to(...)` on that one only):
    what it sends would not be what the others receive. Collective.
    """
    found = [(plain_name(name), str(tensor.dtype)) for name, tensor in named.items()]
    check_same(state.ep, what, {"the dtype of a parameter or buffer": found})


def gather_adapters(model: nn.Module, named: MutableMapping[str, Tensor], prefix: str) -> None:
    """Put the full tensors of the adapters, and of the embeddings and biases, which PEFT may save beside them, into a state
    dict of the parallel `model`, whose names there start with `prefix`. Collective.
    """
    state = required_state(model)
    meet(state.ep, "state_dict")
    kept = {id(tensor) for module in _embeddings(model) for tensor in module.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        row = state.row(name)
        wanted = id(parameter) in kept or "bias" in name or (state.adapters is not None and name in state.adapters)
        cut = row is not None and row.sharded and tuple(parameter.shape) == state.local_shape(row)  # else it is full yet
        if row is not None and wanted and cut and prefix + name in named:
            named[prefix + name] = gather_full(row, parameter.detach(), state.axis_of(row))


def cut_full_tensors(model: nn.Module, named: MutableMapping[str, Tensor], prefix: str) -> None:
    """In a state dict that the parallel `model` is about to load, keep this rank's part of each full tensor."""
    state = required_state(model)
    for name in [key for key in named if key.startswith(prefix)]:
        row = state.row(plain_name(name.removeprefix(prefix)))
        if row is not None and row.sharded and isinstance(named[name], Tensor) and tuple(named[name].shape) == row.shape:
            axis = state.axis_of(row)
            named[name] = row.layout.shard(named[name], axis.get_local_rank(), axis.size())


def _embeddings(model: nn.Module) -> list[nn.Module]:
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return [module for getter in getters if getter is not None and (module := getter()) is not None]


def gather_full(row: ShardSpec, local: Tensor, mesh: DeviceMesh) -> Tensor:
    """The full tensor of `row` on every rank, from each rank's `local`. Collective. Shape: `row.shape`; dtype and device of
    `local`; on meta nothing is sent.
    """
    if not row.sharded:
        return local
    if local.is_meta:
        return local.new_empty(row.shape)
    return gather_whole(local.detach(), row.layout, row.shape, mesh)


def gather_to_first(
    row: ShardSpec, local: Tensor, mesh: DeviceMesh, box: tuple[tuple[int, int], ...] | None = None, share: bool = False
) -> Tensor | None:
    """The full tensor of `row`, or the `box` of it (a half-open range for each dim), on the CPU of the first rank; None on the
    others. With `share`, what is all there already may come as a view of `local`. Collective.

    Each range is sent once, by the first rank that holds it, so the first rank needs room for the result, and its device for
    one piece.
    """
    rank, size = mesh.get_local_rank(), mesh.size()
    ranges = box or tuple((0, length) for length in row.shape)
    local = local.detach()
    cut = row.layout.cut(row.shape)
    if cut is None:
        return _on_cpu(_within(local, ranges), share) if rank == 0 else None
    dim, (low, high) = cut[0], ranges[cut[0]]
    mine = _holds(row, size, low, high) if share else None
    if mine is not None:
        return _on_cpu(_within(local, _along(ranges, dim, low - mine, high - mine)), share) if rank == 0 else None
    full = torch.empty([stop - start for start, stop in ranges], dtype=local.dtype, device="cpu") if rank == 0 else None
    done: set[int] = set()
    for source in range(size):
        for piece in row.layout.pieces(row.shape, source, size):
            start, stop = max(piece.full.start, low), min(piece.full.stop, high)
            if piece.full.start in done or start >= stop:
                continue
            done.add(piece.full.start)
            shift = piece.local.start - piece.full.start
            where = _along(ranges, dim, start + shift, stop + shift)
            target = full.narrow(dim, start - low, stop - start) if full is not None else None
            _send_piece(local, where, source, target, mesh)
    return full


def _holds(row: ShardSpec, size: int, low: int, high: int) -> int | None:
    """Where in the full tensor the first rank's piece starts (less where it does in the shard) that has all of low:high."""
    for piece in row.layout.pieces(row.shape, 0, size):
        if piece.full.start <= low and high <= piece.full.stop:
            shift: int = piece.full.start - piece.local.start
            return shift
    return None


def _send_piece(
    local: Tensor, where: tuple[tuple[int, int], ...], source: int, target: Tensor | None, mesh: DeviceMesh
) -> None:
    rank, group, device = mesh.get_local_rank(), mesh.get_group(), point_to_point_device(mesh)
    if rank == source and target is not None:
        target.copy_(_within(local, where))
    elif rank == source:
        dist.send(_within(local, where).to(device).contiguous(), group=group, group_dst=0)
    elif target is not None:
        straight = target.is_contiguous() and target.device == device
        piece = target if straight else torch.empty_like(target, memory_format=torch.contiguous_format, device=device)
        dist.recv(piece, group=group, group_src=source)
        if not straight:
            target.copy_(piece)


def _within(tensor: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in ranges)]


def _along(ranges: tuple[tuple[int, int], ...], dim: int, start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """`ranges`, but start:stop along `dim`."""
    return (*ranges[:dim], (start, stop), *ranges[dim + 1 :])


def _on_cpu(tensor: Tensor, share: bool) -> Tensor:
    return tensor.cpu() if share else tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _gather_all(state: ModelState, named: dict[str, Tensor]) -> dict[str, Tensor] | None:
    rows = {name: row_of(state, name, tensor) for name, tensor in named.items()}
    gathered: dict[str, Tensor] = {}
    full: dict[str, Tensor] = {}
    for name, tensor in named.items():
        row = rows[name]
        if row.name not in gathered:
            whole = gather_to_first(row, tensor, state.axis_of(row))
            gathered[row.name] = torch.empty(0, device="cpu") if whole is None else whole
        full[plain_name(name)] = gathered[row.name]
    return full if state.ep.get_local_rank() == 0 else None
