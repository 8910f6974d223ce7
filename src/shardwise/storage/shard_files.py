"""The files of a Hugging Face checkpoint: their names, which tensors go into which, and the bytes in front of the tensors.

Nothing is written here; `writer` does that. The rules are those of the libraries, and are asked of them where they can be:
`huggingface_hub` splits the tensors over files, safetensors itself says in which order they lie in one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from huggingface_hub import split_state_dict_into_shards_factory

from shardwise.errors import CheckpointError, describe

_METADATA_KEY = "__metadata__"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint, before there is any data: its name, dtype and full shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Its length along the first dim; of a scalar, 1."""
        return self.shape[0] if self.shape else 1

    def __str__(self) -> str:
        return f"{self.name}: {spell(self.dtype, self.shape)}"


@dataclass(frozen=True, slots=True)
class Names:
    """The names that transformers gives a checkpoint's files; `variant` "fp16" makes `model.fp16.safetensors`."""

    variant: str | None = None

    def __post_init__(self) -> None:
        if self.variant is not None and not re.fullmatch(r"[^/\\{}\0]+", self.variant):
            raise ValueError(f"variant={self.variant!r} cannot be a part of a file name.")

    @property
    def _stem(self) -> str:
        return "model" if self.variant is None else f"model.{self.variant}"

    @property
    def weights(self) -> str:
        """The file of a checkpoint that fits into one."""
        return f"{self._stem}.safetensors"

    @property
    def index(self) -> str:
        """The index of a checkpoint of several files."""
        return f"model.safetensors.index{'' if self.variant is None else f'.{self.variant}'}.json"

    @property
    def pattern(self) -> str:
        """For `huggingface_hub`: a name with `{suffix}` in the place of a shard's number."""
        return f"{self._stem}{{suffix}}.safetensors"

    def generation(self, shard: str, number: int) -> str:
        """Another name for `shard`; still one that transformers' `save_pretrained` takes for a shard and cleans away."""
        return f"{self._stem}-{number}{shard.removeprefix(self._stem)}"

    def is_shard(self, file: str) -> bool:
        """Whether `file` is named as a shard of this variant, of whatever generation."""
        return re.fullmatch(rf"{re.escape(self._stem)}(-\d+)?-\d{{5,}}-of-\d{{5,}}\.safetensors", file) is not None


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One safetensors file and its tensors, in the order in which they lie in it."""

    name: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class FilePlan:
    """Which tensors go into which files, in the order in which `CheckpointWriter.write` takes them."""

    files: tuple[ShardFile, ...]
    names: Names

    def __iter__(self) -> Iterator[ShardFile]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All tensors, in the order of writing."""
        return tuple(entry for file in self.files for entry in file.entries)

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> file name."""
        return {entry.name: file.name for file in self.files for entry in file.entries}


def plan_files(entries: Iterable[Entry], *, max_shard_size: int | str = "50GB", variant: str | None = None) -> FilePlan:
    """Split a checkpoint into the files that `PreTrainedModel.save_pretrained` would write for the same state dict.

    Args:
        entries: the tensors, in the order of the state dict (the split depends on it).
        max_shard_size: bytes, or a size such as "5MB"; a larger tensor gets a file of its own.
        variant: becomes part of the names, "fp16" -> `model.fp16.safetensors`.

    Raises:
        ValueError: no entries, a name twice, a `max_shard_size` or `variant` that makes no sense.
        CheckpointError: a name or dtype that safetensors cannot store.
    """
    by_name: dict[str, Entry] = {}
    for entry in entries:
        if by_name.setdefault(entry.name, entry) is not entry:
            raise ValueError(f"{entry.name}: two tensors of this name ({by_name[entry.name]}; {entry}).")
    if not by_name:
        raise ValueError("There are no tensors to save.")
    _check_storable(list(by_name.values()))
    names = Names(variant)
    split = split_state_dict_into_shards_factory(
        by_name, get_storage_size=_nbytes, filename_pattern=names.pattern, max_shard_size=max_shard_size
    )
    files = []
    for file, members in split.filename_to_tensors.items():
        order = _stored_dtypes(by_name[member] for member in members)
        files.append(ShardFile(file, tuple(by_name[member] for member in order)))
    return FilePlan(tuple(files), names)


def safetensors_header(file: ShardFile, metadata: Mapping[str, str]) -> bytes:
    """What precedes the tensors in `file`: the header and its length, as `safetensors.torch.save_file` writes them.

    Of several metadata, safetensors writes a random order; here they are sorted.
    """
    codes = _stored_dtypes(file.entries)
    header: dict[str, object] = {_METADATA_KEY: dict(sorted(metadata.items()))}
    offset = 0
    for entry in file.entries:
        # Two 4-bit numbers lie in a byte, which is torch's element; the header counts numbers.
        shape = (*entry.shape[:-1], entry.shape[-1] * 2) if codes[entry.name] == "F4" else entry.shape
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": codes[entry.name], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def spell(dtype: torch.dtype, shape: Iterable[int]) -> str:
    """For messages: `float32 (4, 8)`."""
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _nbytes(entry: Entry) -> int:
    return entry.nbytes


def _stored_dtypes(entries: Iterable[Entry]) -> dict[str, str]:
    """Name -> safetensors' word for its dtype, in the order in which safetensors lays the tensors out.

    Asked of safetensors, by empty tensors of the same names and dtypes: it orders by its own list of dtypes, which grows.
    """
    data = safetensors.torch.save({entry.name: torch.empty(0, dtype=entry.dtype) for entry in entries})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: facts["dtype"] for name, facts in header.items()}


def _check_storable(entries: list[Entry]) -> None:
    refused = {dtype for dtype in {entry.dtype for entry in entries} if not _is_storable(dtype)}
    problems = [str(entry) for entry in entries if entry.dtype in refused]
    problems += [f"{entry.name!r}: not a name" for entry in entries if not _is_name(entry.name)]
    if problems:
        shown = problems[:5] + ["..."] * (len(problems) > 5)
        raise CheckpointError(describe(f"safetensors cannot store {len(problems)} of {len(entries)} tensors.", tensors=shown))


def _is_storable(dtype: torch.dtype) -> bool:
    try:
        safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
    except (KeyError, RuntimeError):
        return False
    return True


def _is_name(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name != _METADATA_KEY
