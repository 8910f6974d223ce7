"""Opening a checkpoint's files without reading a weight: every key becomes a lazy tensor over a memory mapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shardwise.checkpoint.find import weight_map_of
from shardwise.checkpoint.safetensors_files import safetensors_sources
from shardwise.checkpoint.source import FileSource
from shardwise.checkpoint.torch_files import OneFile, torch_sources
from shardwise.errors import CheckpointError, describe
from shardwise.lazy import LazyTensor, lazy, sources


def open_checkpoint(files: Sequence[Path], index: Path | None = None) -> dict[str, LazyTensor]:
    """Every tensor of `files` by its key, at its full shape and in the dtype it is stored in. Only headers are read.

    The returned tensors keep the files mapped. Files of torch before 1.6, and compressed ones, can't be mapped: they are read
    whole, and one at a time is kept in memory (see `read_whole`).

    Args:
        files: those that end in `.safetensors`; all others are what `torch.save` wrote.
        index: which of them holds which key.

    Raises:
        CheckpointError: a file is missing, empty, truncated, in neither format, holds anything but tensors, or a dtype that
            torch doesn't have; two files hold the same key; or the index is not readable or disagrees with the files.
    """
    found: dict[str, FileSource] = {}
    for source in _sources(files):
        if source.key in found:
            raise CheckpointError(
                describe(
                    f"{source.key} is in two files of the checkpoint.",
                    files=[str(found[source.key].file), str(source.file)],
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


def read_whole(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """The names of the files that can't be mapped, of which each rank reads all."""
    found = (source for tensor in tensors.values() for source in sources(tensor))
    return sorted({source.file.name for source in found if isinstance(source, FileSource) and not source.mapped})


def _sources(files: Sequence[Path]) -> Iterator[FileSource]:
    held = OneFile()
    for file in map(Path, files):
        yield from safetensors_sources(file) if file.suffix == ".safetensors" else torch_sources(file, held)


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
