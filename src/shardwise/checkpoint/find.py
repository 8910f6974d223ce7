"""Where a checkpoint's files lie: in a directory, or on the hub."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from shardwise.errors import CheckpointError, describe


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """Where a checkpoint lies: its files, and the index that says which keys each holds (None for one file)."""

    files: tuple[Path, ...]
    index: Path | None = None


def find_checkpoint(
    path_or_id: str | os.PathLike[str],
    *,
    subfolder: str = "",
    revision: str | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    **hub_kwargs: Any,
) -> CheckpointFiles:
    """The weights' files of a directory or of a model on the hub, which are downloaded into its cache where they aren't yet:
    safetensors, and only where there are none `.bin` files.

    Args:
        variant: looks for `model.{variant}.safetensors`.
        use_safetensors: True for no `.bin` files, False for these alone.
        hub_kwargs: `cache_dir`, `token`, `local_files_only`, `force_download`, `proxies`; for a model on the hub.

    Raises:
        CheckpointError: there are none; or the index can't be read or names a file that isn't there.
    """
    options = {name: value for name, value in {"revision": revision, **hub_kwargs}.items() if value is not None}
    where = _Place(str(path_or_id), subfolder, options)
    dot = f".{variant}" if variant else ""
    wanted = _names(dot, use_safetensors)
    found = next((file for name in wanted if (file := where.file(name)) is not None), None)
    if found is None:
        raise _not_found(where, wanted, _names(dot, None))
    if found.suffix != ".json":
        return CheckpointFiles((found,))
    index = found
    files = []
    for name in sorted(set(weight_map_of(index).values())):
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


def _names(dot: str, use_safetensors: bool | None) -> list[str]:
    """What a checkpoint's file, or index of several, may be called: the first that is there is the one, as in transformers."""
    safe = [f"model{dot}.safetensors", f"model.safetensors.index{dot}.json"]
    torch = [f"pytorch_model{dot}.bin", f"pytorch_model.bin.index{dot}.json"]
    return (safe if use_safetensors is not False else []) + (torch if not use_safetensors else [])


def weight_map_of(index: Path) -> dict[str, str]:
    """The file of every key, as an index says. Raises CheckpointError where it can't be read."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(item, str) for pair in weight_map.items() for item in pair):
            raise TypeError("weight_map is not a map of keys to file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(index, "not a readable checkpoint index", repr(error)) from error
    return dict(weight_map)


def size_of(file: Path) -> int:
    """The bytes of a file. Raises CheckpointError where there is none, it is empty, or git has not fetched it."""
    if not file.is_file():
        raise broken(file, "there is no such file", "missing")
    size = file.stat().st_size
    if not size:
        raise broken(file, "the file is empty", "0 bytes")
    with file.open("rb") as stream:
        if stream.read(8) == b"version ":
            raise broken(file, "this is not the file itself", "a git-lfs pointer: run `git lfs pull`")
    return size


def broken(file: Path, problem: str, found: str, *instead: str) -> CheckpointError:
    """The error for one file that can't be used; `instead` are the ways out, by default to get the file again."""
    ways = instead or ("download or copy the file again, or", "save the model again with save_pretrained")
    return CheckpointError(describe(f"{file.name}: {problem}.", file=str(file), found=found, either=ways))


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


def _not_found(where: _Place, wanted: list[str], known: list[str]) -> CheckpointError:
    other = [name for name in known if name not in wanted and where.file(name) is not None]
    way_out = ["leave use_safetensors out, or"] if other else ["correct the path, hub id, subfolder or variant, or"]
    return CheckpointError(
        describe(
            f"{where.root}: there is no checkpoint" + (f" in {where.subfolder}." if where.subfolder else "."),
            wanted=" or ".join(wanted),
            **({"found": other} if other else {}),
            searched="the directory" if os.path.isdir(where.root) else "the hub, or its cache where the hub can't be reached",
            either=[*way_out, "save the model there with save_pretrained"],
        )
    )
