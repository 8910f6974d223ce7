"""Write the ordinary Hugging Face checkpoint from the shards: gathered, converted back and streamed to disk as it
arrives.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import CheckpointError, ShardwiseError, describe
from shardwise.gathering import check_dtypes, gather_to_first
from shardwise.hf import checkpoint_tensors, description_files
from shardwise.lazy import Box, LazyTensor, lazy, read
from shardwise.mesh import all_replicas, is_first_replica, local_device, replica_groups
from shardwise.model_state import ModelState, plain_name, required_state, row_of
from shardwise.rendezvous import DEFAULT_TIMEOUT, meet_ranks
from shardwise.replicas import check_same_arguments
from shardwise.spec import ShardSpec
from shardwise.storage import CheckpointWriter, Entry, FilePlan, plan_files

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

_PART_BYTES = 2**20  # larger ones leave the cache between their copies, and are new pages each time: twice as slow
_BATCH_BYTES = 64 * 2**20


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    save_original_format: bool = True,
    timeout: float = DEFAULT_TIMEOUT,
    **unused: object,
) -> None:
    """Save a parallel model as transformers would save the ordinary one: the same names, bytes, config and index. Collective.

    Some rows of a tensor at a time, so that no rank ever holds more than its shards and a few MiB, and all at once: a crash at
    any moment leaves the earlier checkpoint in the directory whole.

    Args:
        model: a parallel model, on every rank of its tp axis, and in every data-parallel replica of its mesh.
        save_directory: where to; the first rank writes. No rank returns before the files are there.
        max_shard_size: the size above which several files are written, in bytes or as "5GB".
        variant: goes into the file names ("model.fp16.safetensors").
        save_original_format: convert the weights back to the form that the checkpoint had (one matrix an expert, ...).
        timeout: seconds to wait for the other ranks to make this call.
        unused: `is_main_process`, `safe_serialization` and `save_peft_format` mean nothing here; other keywords are refused.

    Raises `MissingRankError` when some rank does not call it, `MismatchError` when they differ in what they call it with or in
    dtypes, and `CheckpointError`, on every rank, when writing fails.
    """
    _refuse(model, unused)
    directory = os.fspath(save_directory)  # on every rank: what is wrong with it must not be news to the first one only
    state = required_state(model)
    mesh = state.mesh
    meet_ranks(all_replicas(mesh), "save_pretrained", timeout)
    check_same_arguments(mesh, "save_pretrained", directory, max_shard_size, variant, save_original_format)
    check_dtypes(state, model.state_dict(keep_vars=True), "save_pretrained")
    tensors = checkpoint_tensors(model, dict(_lazy_shards(model)), save_original_format)
    plan = plan_files(
        [Entry(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], max_shard_size=max_shard_size, variant=variant
    )
    writes = mesh.get_local_rank() == 0 and is_first_replica(mesh)
    writer = CheckpointWriter(directory, plan) if writes else None
    _Save(model, state, plan, tensors, writer).run()


@dataclass(frozen=True)
class ShardSource:
    """A parameter that lies on the ranks, as a source of lazy tensors: reading a box of it is collective."""

    row: ShardSpec
    local: Tensor
    mesh: DeviceMesh

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.row.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    def read(self, box: Box) -> Tensor:
        """The box, on the CPU of the first rank; elsewhere a stand-in of that shape that takes no memory."""
        full = gather_to_first(self.row, self.local, self.mesh, tuple(box), share=True)
        shape = [stop - start for start, stop in box]
        return full if full is not None else torch.zeros((), dtype=self.dtype, device="cpu").expand(shape)


@dataclass
class _Save:
    """One call: every rank walks the same tensors in the same order, and one of them writes."""

    model: PreTrainedModel
    state: ModelState
    plan: FilePlan
    tensors: dict[str, Tensor]
    writer: CheckpointWriter | None

    def run(self) -> None:
        failure: Exception | None = None
        with contextlib.ExitStack() as stack:
            try:
                if self.writer is not None:
                    stack.enter_context(self.writer)
                    for name, data in description_files(self.model):
                        self.writer.add_file(name, data)
            except Exception as error:
                failure = error
            for entries in _batches(self.plan.entries):
                if self._failed(failure):
                    break
                for entry in entries:
                    failure = self._copy(entry, failure)
            failure = self._close(stack, failure)
        if self._failed(failure, replicas=True):
            raise failure or CheckpointError(
                "save_pretrained: the writing rank failed; its own message says why. The earlier checkpoint is whole."
            )

    def _copy(self, entry: Entry, failure: Exception | None) -> Exception | None:
        """From the ranks to the disk, and what went wrong there or before. A large tensor goes some rows at a time, all of them
        even where the disk takes no more: the other ranks know nothing of that yet.
        """
        step = max(1, _PART_BYTES * entry.rows // max(entry.nbytes, 1))
        columns = tuple((0, width) for width in entry.shape[1:])
        for start in range(0, max(entry.rows, 1), step):
            rows = ((start, min(start + step, entry.rows)),) if entry.shape else ()
            part = read(self.tensors[entry.name], (*rows, *columns))
            failure = failure or self._write(entry, part, start)
        return failure

    def _write(self, entry: Entry, part: Tensor, start: int) -> Exception | None:
        try:
            if self.writer is not None:
                self.writer.write(entry, part, start)
        except Exception as error:
            return error
        return None

    def _close(self, stack: contextlib.ExitStack, failure: Exception | None) -> Exception | None:
        """End the writer's block, which publishes the files only where nothing failed."""
        try:
            stack.__exit__(type(failure) if failure else None, failure, failure.__traceback__ if failure else None)
        except Exception as error:
            return failure or error
        return failure

    def _failed(self, failure: Exception | None, replicas: bool = False) -> bool:
        """Whether the writing rank has failed, as it tells the others, so that none is left waiting or goes on too early."""
        ep = self.state.ep
        flag = torch.tensor([int(failure is not None)], device=local_device(ep))
        for group in (ep.get_group(), *(replica_groups(ep) if replicas else ())):
            dist.all_reduce(flag, group=group)
        return bool(flag.item())


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """What is copied between two times that the ranks tell each other how it goes."""
    batch: list[Entry] = []
    left = _BATCH_BYTES
    for entry in entries:
        batch.append(entry)
        left -= entry.nbytes
        if left <= 0:
            yield batch
            batch, left = [], _BATCH_BYTES
    yield batch


def _lazy_shards(model: PreTrainedModel) -> Iterator[tuple[str, LazyTensor]]:
    state = required_state(model)
    made: dict[str, LazyTensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        row = row_of(state, name, tensor)
        if row.name not in made:
            made[row.name] = lazy(ShardSource(row, tensor.detach(), state.axis_of(row)))
        yield plain_name(name), made[row.name]


def _refuse(model: PreTrainedModel, keywords: dict[str, object]) -> None:
    for name in ("is_main_process", "safe_serialization", "save_peft_format", "token"):
        keywords.pop(name, None)
    given = [name for name, value in keywords.items() if value is not None and value is not False]
    if given:
        raise ShardwiseError(
            describe(
                f"save_pretrained({', '.join(given)}=...) is not possible for a parallel model.",
                either=[
                    "save to a directory, and push that with huggingface_hub.upload_folder on one rank, or",
                    "shardwise.unparallelize(model) first",
                ],
            )
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ShardwiseError(
            "save_pretrained: adapters loaded into a parallel model cannot be saved yet: shardwise.unparallelize(model) first."
        )
