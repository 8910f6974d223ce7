"""Files of `torch.save` (`pytorch_model.bin`), opened without reading a weight where they can be mapped.

Since torch 1.6 such a file is an archive in which every tensor's bytes lie as they are, so that a slice reads only its own.
Older files, and archives that somebody has compressed, can only be read whole. Nothing but tensors is ever unpickled.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.checkpoint.find import broken, size_of
from shardwise.checkpoint.source import FileSource
from shardwise.errors import CheckpointError

_ARCHIVE = b"PK\x03\x04"
_GLOBAL = re.compile(r"GLOBAL (\S+)|class (\S+)")
_CONVERT = "where you trust it, load it in one process, and save its model with save_pretrained"


class OneFile:
    """The file that can't be mapped and was read last: one of several is in memory at a time."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._tensors: dict[str, Tensor] = {}

    def tensors(self, file: Path) -> dict[str, Tensor]:
        """All of `file`."""
        if file != self._file:
            self._tensors = {}  # before the next one comes
            self._tensors, self._file = _load(file, mmap=False), file
        return self._tensors

    def tensor(self, file: Path, key: str) -> Tensor:
        """One of `file`."""
        return self.tensors(file)[key]


def torch_sources(file: Path, held: OneFile) -> Iterator[FileSource]:
    """Every key of one file, in its order. The returned sources keep it mapped, or read it whole through `held`.

    Raises CheckpointError where it is not all there, not of `torch.save`, or holds anything but plain tensors by name.
    """
    mapped = _can_be_mapped(file)
    tensors = _load(file, mmap=True) if mapped else held.tensors(file)
    seen: dict[object, Callable[[], Tensor]] = {}
    for key, tensor in tensors.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        whole = partial(_itself, tensor) if mapped else partial(held.tensor, file, key)
        shared = seen.setdefault(place, whole) if tensor.numel() else whole
        yield FileSource(key, file, tuple(tensor.shape), tensor.dtype, shared, mapped)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _can_be_mapped(file: Path) -> bool:
    """Whether the bytes of the tensors lie in the file as they are."""
    size_of(file)
    with file.open("rb") as stream:
        start = stream.read(len(_ARCHIVE))
    if start != _ARCHIVE:
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise broken(file, "the file is truncated or damaged", str(error)) from error
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise broken(file, "this is a TorchScript archive, which holds a program", "constants.pkl", _CONVERT)
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)  # torch maps compressed bytes as they are


def _load(file: Path, mmap: bool) -> dict[str, Tensor]:
    try:
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever damaged bytes make of the unpickler
        raise _unreadable(file, error) from error
    if not isinstance(loaded, Mapping):
        raise broken(file, "this is no model's state dict", f"{type(loaded).__name__}", _CONVERT)
    for key, value in loaded.items():
        if problem := _problem(key, value):
            raise broken(file, f"this is no model's state dict: {key!r} is no plain tensor", problem, _CONVERT)
    return {key: value.detach() for key, value in loaded.items()}


def _problem(key: object, value: object) -> str | None:
    if not isinstance(key, str):
        return f"a name that is {type(key).__name__}"
    if type(value) not in (Tensor, nn.Parameter):
        return type(value).__name__
    assert isinstance(value, Tensor)
    if value.layout != torch.strided or value.is_quantized:
        return "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
    return None if value.device.type == "cpu" else f"on {value.device.type}, without values"


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    text = str(error)
    if "weights_only" in text and (found := _GLOBAL.search(text)):
        name = found[1] or found[2]
        return broken(file, "it holds more than tensors, which to unpickle can run any program", name, _CONVERT)
    first = next((line for line in text.splitlines() if line.strip()), "")
    return broken(file, "this is not a file of torch.save, or it is damaged", f"{type(error).__name__}: {first}")
