"""Finding a checkpoint's safetensors files, and opening them without reading a weight.

Every tensor becomes a `LazyTensor` over a memory mapping, so that reading a box touches only the pages that it lies on. What
can be wrong with the files themselves is found when they are opened, from their headers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

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


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """Where a checkpoint lies: its safetensors files, and the index that says which keys each holds (None for one file)."""

    files: tuple[Path, ...]
    index: Path | None = None


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


def find_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    subfolder: str = "",
    revision: str | None = None,
    variant: str | None = None,
    **hub_kwargs: Any,
) -> CheckpointFiles:
    """The safetensors files of a directory or of a model on the hub, which are downloaded into its cache where they aren't yet.

    Args:
        variant: looks for `model.{variant}.safetensors`.
        hub_kwargs: `cache_dir`, `token`, `local_files_only`, `force_download`, `proxies`; for a model on the hub.

    Raises:
        CheckpointError: there are none; only `.bin` files; or the index can't be read or names a file that isn't there.
    """
    options = {name: value for name, value in {"revision": revision, **hub_kwargs}.items() if value is not None}
    where = _Place(str(path_or_id), subfolder, options)
    dot = f".{variant}" if variant else ""
    single = where.file(f"model{dot}.safetensors")
    if single is not None:
        return CheckpointFiles((single,))
    index = where.file(f"model.safetensors.index{dot}.json")
    if index is None:
        raise _not_found(where, dot)
    files = []
    for name in sorted(set(_weight_map(index).values())):
        file = where.file(name)
        if file is None:
            raise CheckpointError(
                describe(
                    f"{where.root}: {name} is missing.",
                    index=f"{index.name} names it",
                    either=["download or copy the missing file, or", "save the model again with save_pretrained"],
                )
            )
        files.append(file)
    return CheckpointFiles(tuple(files), index)


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


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory, or a model on the hub."""

    root: str
    subfolder: str
    options: dict[str, Any]

    def file(self, name: str) -> Path | None:
        """A file of it by its name; None where there is no such file."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(describe(f"{self.root}: the index names {name}, which lies outside of the checkpoint."))
        if os.path.isdir(self.root):
            path = Path(self.root, self.subfolder, name)
            return path if path.is_file() else None
        try:
            return Path(str(hf_hub_download(self.root, name, subfolder=self.subfolder or None, **self.options)))
        except EntryNotFoundError:  # also where it is not in the cache and can't be downloaded
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise CheckpointError(
                describe(
                    f"{self.root} is neither a directory nor a model that can be fetched.",
                    wanted=name,
                    hub=[line for line in str(error).splitlines() if line],
                    either=["correct the path or hub id, revision or token, or", "download it first and give its directory"],
                )
            ) from error


def _not_found(where: _Place, dot: str) -> CheckpointError:
    names = [f"model{dot}.safetensors", f"model.safetensors.index{dot}.json"]
    for name in (f"pytorch_model{dot}.bin", f"pytorch_model.bin.index{dot}.json"):
        if where.file(name) is not None:
            return CheckpointError(
                describe(
                    f"{where.root}: the checkpoint is in the .bin format, which can't be read in parts.",
                    found=name,
                    wanted=" or ".join(names),
                    convert="load it once with plain transformers, and save it with model.save_pretrained(directory)",
                )
            )
    return CheckpointError(
        describe(
            f"{where.root}: there is no safetensors checkpoint" + (f" in {where.subfolder}." if where.subfolder else "."),
            wanted=" or ".join(names),
            searched="the directory" if os.path.isdir(where.root) else "the hub, or its cache where the hub can't be reached",
            either=["correct the path, hub id, subfolder or variant, or", "save the model there with save_pretrained"],
        )
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(item, str) for pair in weight_map.items() for item in pair):
            raise TypeError("weight_map is not a map of keys to file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(index, "not a readable checkpoint index", repr(error)) from error
    return dict(weight_map)


def _check_index(index: Path, found: Mapping[str, FileSource], files: set[str]) -> None:
    """The index and the files must agree on every key."""
    weight_map = _weight_map(index)
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
            raise _broken(file, f"{key} is stored in a dtype that torch does not have", entry.dtype)
        yield FileSource(key, file, entry.shape, dtype, mapped)


def _map(file: Path) -> safe_open:
    try:
        try:
            return safe_open(str(file), framework="pt", device="cpu", backend="mmap")
        except TypeError:  # before safetensors 0.8 there was no other backend, and no such argument
            return safe_open(str(file), framework="pt", device="cpu")
    except SafetensorError as error:
        raise _broken(file, "this is not a safetensors file", str(error)) from error


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    stop: int  # the first byte after it, counted from the end of the header


def _entries(file: Path) -> dict[str, _Entry]:
    """What the header of a file says. Read here and not by safetensors, whose errors name neither the file nor the sizes."""
    if not file.is_file():
        raise _broken(file, "there is no such file", "missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if not size:
            raise _broken(file, "the file is empty", "0 bytes")
        if size < 8 or length > _HEADER_LIMIT:
            hint = "a git-lfs pointer: run `git lfs pull`" if start == b"version " else f"it starts with {start!r}"
            raise _broken(file, "this is not a safetensors file", hint)
        if size < 8 + length:
            raise _broken(file, "the file is truncated", f"{size:,} bytes, with a header of {length:,}")
        header = stream.read(length)
    try:
        entries = {key: _entry(entry) for key, entry in json.loads(header).items() if key != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(file, "this is not a safetensors file: its header can't be read", repr(error)) from error
    needed = 8 + length + max((entry.stop for entry in entries.values()), default=0)
    if size < needed:
        lost = next(key for key, entry in entries.items() if 8 + length + entry.stop > size)
        raise _broken(file, f"the file is truncated; {lost} is not all there", f"{size:,} bytes of {needed:,}")
    return entries


def _entry(entry: dict[str, Any]) -> _Entry:
    return _Entry(str(entry["dtype"]), tuple(int(length) for length in entry["shape"]), int(entry["data_offsets"][1]))


def _broken(file: Path, problem: str, found: str) -> CheckpointError:
    return CheckpointError(
        describe(
            f"{file.name}: {problem}.",
            file=str(file),
            found=found,
            either=["download or copy the file again, or", "save the model again with save_pretrained"],
        )
    )
