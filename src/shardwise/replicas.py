"""Whether the ranks agree on what they hold in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shardwise.collectives import gather_into
from shardwise.errors import MismatchError, ShardwiseError, describe, ranks_in_words
from shardwise.mesh import local_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_Made = TypeVar("_Made")


def together(mesh: DeviceMesh | None, what: str, make: Callable[[], _Made]) -> _Made:
    """Call `make`, which makes no collective calls, on every rank (of all, without a `mesh`), and return what it gives there.
    Collective.

    Where it raises on some rank, it raises on all, so that none waits for another that is gone: the rank's own exception there,
    `MismatchError` elsewhere, naming the rank and `what` failed.
    """
    made: list[_Made] = []
    failure: Exception | None = None
    try:
        made.append(make())
    except Exception as error:
        failure = error
    size, rank, group = dist.get_world_size(), dist.get_rank(), None
    if mesh is not None:
        size, rank, group = mesh.size(), mesh.get_local_rank(), mesh.get_group()
    failed = torch.zeros(size, dtype=torch.int64, device=local_device(mesh))
    failed[rank] = int(failure is not None)
    dist.all_reduce(failed, group=group)
    if failure is not None:
        raise failure
    if failed.any():
        ranks = ranks_in_words(failed.nonzero().flatten().tolist())
        raise MismatchError(f"{what} failed on {ranks}, and so it does here; the message there says why.")
    return made[0]


def check_same(mesh: DeviceMesh, what: str, facts: Mapping[str, object], **said: str) -> None:
    """Raise `MismatchError`, on every rank, when the ranks' texts of a fact differ: the first of `facts`, in words, and the
    rank. Collective.

    Args:
        what: who asks, for the message.
        facts: what must be the same, by how messages name it; the same names on every rank.
        said: further lines of the message.
    """
    numbers = torch.tensor([digest(fact) for fact in facts.values()], device="cpu")
    if first_difference(numbers, mesh) is None:
        return
    for name, number in zip(facts, numbers.split(1), strict=True):
        if (rank := first_difference(number, mesh)) is not None:
            raise MismatchError(
                describe(
                    f"{what}: {name} on rank {rank} is not that of rank 0.",
                    **said,
                    either=["give every rank the same arguments, or", "make sure that all see the same files"],
                )
            )


def check_same_weights(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise `MismatchError`, on every rank, when the ranks' copies of an ordinary model differ, naming the first tensor.
    Collective.
    """
    # By name: a model may register its buffers in the order of a set, which is another one in every process.
    everything = sorted((*model.named_parameters(), *model.named_buffers()), key=lambda item: item[0])
    named = {name: tensor for name, tensor in everything if not tensor.is_meta}
    sums = torch.tensor([len(named), *(checksum(tensor) for tensor in named.values())], dtype=torch.int64, device="cpu")
    if (rank := first_difference(sums[:1], mesh)) is not None:
        raise MismatchError(
            f"Rank {rank} has another number of parameters and buffers than rank 0: build the same model on every rank."
        )
    for name, value in zip(named, sums[1:].split(1), strict=True) if first_difference(sums, mesh) is not None else ():
        if (rank := first_difference(value, mesh)) is not None:
            raise MismatchError(
                describe(
                    f"{name}: rank {rank} holds other values than rank 0.",
                    either=[
                        "call torch.manual_seed with the same seed on every rank before the model is built, or",
                        "load the same checkpoint on every rank",
                    ],
                )
            )


def check_same_arguments(mesh: DeviceMesh, what: str, *arguments: object) -> None:
    """Raise `MismatchError`, on every rank, when the ranks call `what` with different arguments. Collective."""
    if (rank := first_difference(torch.tensor([digest(*arguments)]), mesh)) is not None:
        mine = ", ".join(map(str, arguments))
        raise MismatchError(
            describe(
                f"{what}: rank {rank} was called with other arguments than rank 0.",
                here=mine,
                either=["make the same call on every rank"],
            )
        )


def digest(*parts: object) -> int:
    """A number (int64) for the text of `parts`: the same in every process for the same text."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def first_difference(values: Tensor, mesh: DeviceMesh) -> int | None:
    """The first rank whose `values` (n, int64, as long on every rank) differ from rank 0's. Collective."""
    mine = values.to(local_device(mesh))
    everyone = mine.new_empty(mesh.size() * len(mine))
    gather_into(everyone, mine, group=mesh.get_group())
    rows = everyone.view(mesh.size(), -1).cpu()
    return next((rank for rank in range(1, mesh.size()) if not torch.equal(rows[rank], rows[0])), None)


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bits, taken as integers: the same for the same bits, NaNs included."""
    whole = tensor.detach().contiguous().view(-1)
    if tensor.dtype == torch.bool:
        whole = whole.view(torch.uint8)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    return int(whole.view(width).sum(dtype=torch.int64)) if tensor.numel() else 0


def refuse_data_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise `ShardwiseError` in the forward of a DDP that takes the ranks of `mesh`, which have a part of `model` each, for
    replicas: it gave them the first one's part, and would average their gradients. accelerate wraps models so.
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None:
        return
    shared = set(dist.get_process_group_ranks(ddp.process_group)) & set(mesh.mesh.flatten().tolist())
    held = {id(parameter) for parameter in ddp._module_parameters}
    if len(shared) > 1 and any(id(parameter) in held for parameter in model.parameters()):
        raise ShardwiseError(
            describe(
                f"DistributedDataParallel has made the parts on {ranks_in_words(sorted(shared))} all the first one's.",
                why=f"these are the ranks of one {type(model).__name__}, and no replicas",
                note="the weights are lost: load the model again",
                either=[
                    "DistributedDataParallel(model, process_group=...) over the replicas (without any, leave it out), or",
                    "shardwise.Trainer, in place of accelerate's Accelerator.prepare(model)",
                ],
            )
        )
