"""Opening safetensors files without reading a weight: every key becomes a lazy tensor over a memory mapping."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardwise.checkpoint.find import broken, weight_map_of
from shardwise.errors import CheckpointError, describe
from shardwise.lazy import Box, LazyTensor, lazy

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_HEADER_LIMIT = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True, slots=True, eq=False)
class FileSource:
    """One key of a safetensors file."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    _mapped: safe_open

    @property
    def name(self) -> str:
        """The key and its file, as error messages call it."""
        return f"{self.key} ({self.file.name})"

    def read(self, box: Box) -> Tensor:
        """The values in `box`: a view of the memory mapping, read-only by agreement."""
        tensor: Tensor = self._mapped.get_tensor(self.key)  # type: ignore[no-untyped-call]
        for dim, (start, stop) in enumerate(box):
            tensor = tensor.narrow(dim, start, stop - start)
        return tensor


def open_checkpoint(files: Sequence[Path], index: Path | None = None) -> dict[str, LazyTensor]:
    """Every tensor of `files` by its key, at its full shape and in the dtype it is stored in. Only headers are read.

    The returned tensors keep the files mapped.

    Raises:
        CheckpointError: a file is missing, empty, truncated, not in the safetensors format, or holds a dtype that torch doesn't
            have; two files hold the same key; or the index is not readable or disagrees with the files.
    """
    found: dict[str, FileSource] = {}
    for file in map(Path, files):
        for source in _sources(file):
            if source.key in found:
                raise CheckpointError(
                    describe(
                        f"{source.key} is in two files of the checkpoint.",
                        files=[str(found[source.key].file), str(file)],
                        either=[
                            "remove the file that is not of this model, or",
                            "save the model again with save_pretrained",
                        ],
                    )
                )
            found[source.key] = source
    if index is not None:
        _check_index(index, found, {Path(file).name for file in files})
    return {key: lazy(source) for key, source in found.items()}


def _check_index(index: Path, found: Mapping[str, FileSource], files: set[str]) -> None:
    """The index and the files must agree on every key."""
    weight_map = weight_map_of(index)
    lost = sorted(set(weight_map.values()) - files)
    wrong = [f"{key}: not in {file}" for key, file in weight_map.items() if key not in found or found[key].file.name != file]
    wrong += [f"{key}: in {source.file.name}, not in the index" for key, source in found.items() if key not in weight_map]
    if not lost and not wrong:
        return
    shown = [f"{file}: missing" for file in lost] + wrong
    more = [f"and {len(shown) - 8} more"] if len(shown) > 8 else []
    raise CheckpointError(
        describe(
            f"{index.name} and the files of the checkpoint disagree.",
            index=str(index),
            wrong=shown[:8] + more,
            either=["download or copy all files of the checkpoint again, or", "save the model again with save_pretrained"],
        )
    )


def _sources(file: Path) -> Iterator[FileSource]:
    """Every key of one file, in its order."""
    entries = _entries(file)
    mapped = _map(file)
    for key, entry in entries.items():
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise broken(file, f"{key} is stored in a dtype that torch does not have", entry.dtype)
        yield FileSource(key, file, entry.shape, dtype, mapped)


def _map(file: Path) -> safe_open:
    try:
        try:
            return safe_open(str(file), framework="pt", device="cpu", backend="mmap")
        except TypeError:  # before safetensors 0.8 there was no other backend, and no such argument
            return safe_open(str(file), framework="pt", device="cpu")
    except SafetensorError as error:
        raise broken(file, "this is not a safetensors file", str(error)) from error


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    stop: int  # the first byte after it, counted from the end of the header


def _entries(file: Path) -> dict[str, _Entry]:
    """What the header of a file says. Read here and not by safetensors, whose errors name neither the file nor the sizes."""
    if not file.is_file():
        raise broken(file, "there is no such file", "missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if not size:
            raise broken(file, "the file is empty", "0 bytes")
        if size < 8 or length > _HEADER_LIMIT:
            hint = "a git-lfs pointer: run `git lfs pull`" if start == b"version " else f"it starts with {start!r}"
            raise broken(file, "this is not a safetensors file", hint)
        if size < 8 + length:
            raise broken(file, "the file is truncated", f"{size:,} bytes, with a header of {length:,}")
        header = stream.read(length)
    try:
        entries = {key: _entry(entry) for key, entry in json.loads(header).items() if key != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(file, "this is not a safetensors file: its header can't be read", repr(error)) from error
    needed = 8 + length + max((entry.stop for entry in entries.values()), default=0)
    if size < needed:
        lost = next(key for key, entry in entries.items() if 8 + length + entry.stop > size)
        raise broken(file, f"the file is truncated; {lost} is not all there", f"{size:,} bytes of {needed:,}")
    return entries


def _entry(entry: dict[str, Any]) -> _Entry:
    return _Entry(str(entry["dtype"]), tuple(int(length) for length in entry["shape"]), int(entry["data_offsets"][1]))
