"""Safetensors files, opened without reading a weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from shardwise.checkpoint.find import broken, size_of
from shardwise.checkpoint.source import FileSource

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


def safetensors_sources(file: Path) -> Iterator[FileSource]:
    """Every key of one file, in its order. Its header is read; the returned sources keep the file mapped.

    Raises CheckpointError where it is not all there, not in the format, or holds a dtype that torch doesn't have.
    """
    entries = _entries(file)
    mapped = _map(file)
    for key, entry in entries.items():
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise broken(file, f"{key} is stored in a dtype that torch does not have", entry.dtype)
        yield FileSource(key, file, entry.shape, dtype, partial(mapped.get_tensor, key))


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
    size = size_of(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > _HEADER_LIMIT:
            raise broken(file, "this is not a safetensors file", f"it starts with {start!r}")
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
