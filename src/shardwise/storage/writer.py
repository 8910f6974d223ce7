"""The files of a checkpoint, written tensor by tensor into a staging directory, and published together at the end."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from shardwise.errors import CheckpointError, describe
from shardwise.storage.publish import Staged, publish
from shardwise.storage.shard_files import Entry, FilePlan, safetensors_header, spell
from shardwise.storage.staging import open_staging, write_synced

_CHUNK_BYTES = 64 * 2**20


class CheckpointWriter:
    """Writes the files of a plan, tensor by tensor, and publishes them together when the block ends without an exception.

    Args:
        directory: where the checkpoint goes; created where it isn't there. Files that are not of the checkpoint stay.
        plan: the files, from `plan_files`.
        metadata: what the safetensors files say of themselves; by default `{"format": "pt"}`, which transformers asks for.
        total_parameters: what the index of several files says; by default the number of elements.

    Raises CheckpointError, on entering, where the directory cannot be made or written or another process is saving into it; on
    leaving, where tensors are missing or the files cannot be put into place. The earlier checkpoint is whole in each case.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        plan: FilePlan,
        *,
        metadata: Mapping[str, str] | None = None,
        total_parameters: int | None = None,
    ) -> None:
        elements = sum(math.prod(entry.shape) for entry in plan.entries)
        self._directory = Path(directory).absolute()
        self._plan = plan
        self._metadata = {"format": "pt"} if metadata is None else dict(metadata)
        self._total_parameters = elements if total_parameters is None else total_parameters
        self._pending = deque((file, entry) for file in plan for entry in file.entries)
        self._extras: list[str] = []
        self._stack = contextlib.ExitStack()
        self._staging: Path | None = None
        self._file: FileIO | None = None
        self._offset = 0
        self._rows = 0

    def __enter__(self) -> CheckpointWriter:
        with self._explained():
            self._staging = self._stack.enter_context(open_staging(self._directory))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if self._file is not None:
                with contextlib.suppress(OSError):  # it is thrown away
                    self._file.close()
            if kind is None:
                self._publish()
        self._staging = None

    def write(self, entry: Entry, tensor: Tensor, start: int = 0) -> None:
        """Write the next tensor of the plan, or the rows of it from `start` on, which go on where the last ones ended.

        `tensor` has the entry's dtype and full shape but for the number of rows, on any device, with any strides. Raises
        CheckpointError where it is not this entry's turn, where dtype, shape or start differ, and where the disk does not take
        it. The entry is still to be written then, from these rows on or from its beginning.
        """
        staging = self._open_staging()
        self._check(entry, tensor, start)
        file, _ = self._pending[0]
        stop = start + (len(tensor) if entry.shape else 1)
        complete = stop == entry.rows
        with self._explained():
            if self._file is None:
                self._file = self._start(staging / file.name, safetensors_header(file, self._metadata))
            # Not at the end of what a failed attempt has left.
            self._file.seek(self._offset + (start * entry.nbytes // entry.rows if start else 0))
            for chunk in _chunks(tensor):
                _write_all(self._file, chunk)
            if complete and entry == file.entries[-1]:
                os.fsync(self._file.fileno())
                self._file.close()
                self._file = None
        self._rows = 0 if complete else stop
        if complete:
            self._offset += entry.nbytes
            self._pending.popleft()

    def add_file(self, name: str, data: bytes) -> None:
        """Publish a small file (`config.json`) with the weights.

        Raises ValueError where `name` has a directory in it or is one of the weights', CheckpointError as `write` does.
        """
        staging = self._open_staging()
        names = self._plan.names
        taken = name in (names.weights, names.index, *self._extras) or names.is_shard(name)
        if taken or not name or name.startswith(".") or Path(name).name != name:
            raise ValueError(f"add_file({name!r}): this is not the plain name of a further file.")
        with self._explained():
            write_synced(staging / name, data)
        self._extras.append(name)

    def _start(self, path: Path, header: bytes) -> FileIO:
        file = FileIO(path, "w")
        try:
            _write_all(file, memoryview(header))
        except BaseException:
            file.close()
            raise
        self._offset = len(header)
        return file

    def _open_staging(self) -> Path:
        if self._staging is None:
            raise CheckpointError(f"{self._directory}: the writer is not open; use it in a `with` block.")
        return self._staging

    def _check(self, entry: Entry, tensor: Tensor, start: int) -> None:
        expected = self._pending[0][1] if self._pending else None
        if entry != expected:
            text = describe(
                f"{self._directory}: {entry.name} is not the tensor to be written now.",
                given=str(entry),
                expected=str(expected) if expected else "nothing more",
                either="write the entries in the order of the plan, each once",
            )
            raise CheckpointError(text)
        fits = tensor.dim() == len(entry.shape) and tuple(tensor.shape[1:]) == entry.shape[1:]
        fits = fits and start in (0, self._rows) and start + (len(tensor) if entry.shape else 1) <= entry.rows
        if tensor.dtype != entry.dtype or not fits or tensor.is_meta:
            given = spell(tensor.dtype, tensor.shape) + (" without data (meta)" if tensor.is_meta else "") + _from_row(start)
            planned = spell(entry.dtype, entry.shape) + _from_row(self._rows)
            raise CheckpointError(describe(f"{entry.name}: not the tensor that was planned.", given=given, planned=planned))

    def _publish(self) -> None:
        if self._pending:
            headline = f"{len(self._pending)} of {len(self._plan.entries)} tensors were not written; nothing is published."
            missing = [str(entry) for _, entry in list(self._pending)[:5]] + ["..."] * (len(self._pending) > 5)
            raise CheckpointError(describe(f"{self._directory}: {headline}", missing=missing))
        staged = Staged(
            directory=self._directory,
            staging=self._open_staging(),
            names=self._plan.names,
            shards=tuple(file.name for file in self._plan) if len(self._plan) > 1 else (),
            extras=tuple(self._extras),
            weight_map=self._plan.weight_map,
            metadata={"total_parameters": self._total_parameters, "total_size": self._plan.total_size},
        )
        with self._explained():
            publish(staged)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the system's error into one that says what is needed and what is left."""
        try:
            yield
        except OSError as error:
            facts = {"reason": str(error)}
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                facts["space"] = f"{self._plan.total_size:,} bytes of tensors to write"
                with contextlib.suppress(OSError):
                    facts["space"] += f", {shutil.disk_usage(self._directory).free:,} bytes free now"
                facts["either"] = "make room (an earlier checkpoint stays until the new one is complete), or save elsewhere"
            else:
                facts["either"] = "save to a directory that can be made and written"
            facts["earlier"] = "a checkpoint that was there is as it was"
            raise CheckpointError(describe(f"{self._directory}: the checkpoint cannot be saved.", **facts)) from error


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of `tensor` in row-major order. Where strides or device ask for a copy, it is of one piece at a time."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype.itemsize == 1:
        tensor = tensor.view(torch.uint8)  # 4- and 8-bit floats lack operators
    if tensor.numel() == 0:
        return
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    step = max(1, _CHUNK_BYTES * len(rows) // (tensor.numel() * tensor.dtype.itemsize))
    for part in rows.split(step):
        yield memoryview(part.cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _from_row(start: int) -> str:
    return f", from row {start} on" if start else ""


def _write_all(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
