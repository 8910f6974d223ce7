"""Put a finished checkpoint into its directory, so that a loader finds the earlier one or the new one, never a mixture.

Everything is staged in a hidden sub-directory first. Then the shards and small files move into place, one atomic rename each,
and a single filesystem call, the *flip*, makes a loader (which prefers `model.safetensors` over the index) see the new weights:

    earlier -> new       before the flip                       the flip                     after it
    any     -> one file  config                                replace model.safetensors    unlink index, shards
    index   -> several   shards (under free names), config     replace the index            unlink old shards, tidy names
    one     -> several   shards, index (not yet looked at)     unlink model.safetensors     unlink old shards

Shards never overwrite a file that the present index refers to: they take free names, `model-2-00001-of-00003.safetensors`, and
get their ordinary ones after the flip, by hard links and a second replace of the index. On a filesystem without hard links they
keep the free names, which the index gives.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.storage.shard_files import Names
from shardwise.storage.staging import sync_directory, write_synced

_BACKUP_SUFFIX = ".earlier"


@dataclass(frozen=True, slots=True)
class Staged:
    """A finished checkpoint in `staging`, a sub-directory of `directory`; every file in it is on the disk already.

    Args:
        shards: the files of several, under their ordinary names; empty for a checkpoint of one file.
        extras: small files (`config.json`) that belong to the weights.
        weight_map, metadata: what the index says; unused for a checkpoint of one file.
    """

    directory: Path
    staging: Path
    names: Names
    shards: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    weight_map: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, int] = field(default_factory=dict)

    @property
    def replaced(self) -> tuple[str, ...]:
        """The small files that take the place of others of the same name before the flip."""
        return (self.names.index, *self.extras) if self.shards else self.extras


def publish(staged: Staged) -> None:
    """Make the staged checkpoint the one that a loader finds in `staged.directory`; moves the files there.

    Raises what the filesystem raises. An exception before the flip leaves the directory as it was. After the flip the new
    checkpoint is complete: earlier files that cannot be removed then stay, with a warning.
    """
    final = _free_names(staged)
    if staged.shards:
        write_synced(staged.staging / staged.names.index, _index(staged, final))
    _back_up(staged)
    sync_directory(staged.staging)
    try:
        _place(staged, final)
    except BaseException:
        # The directory itself is asked, not a flag: a KeyboardInterrupt may come between the call that flips and the next line.
        if not _flipped(staged):
            _undo(staged, final)
        raise
    try:
        sync_directory(staged.directory)
        _remove_earlier(staged, set(final.values()))
        _restore_names(staged, final)
    except OSError as error:
        warnings.warn(f"{staged.directory}: the new checkpoint is complete, but clearing up failed: {error}", stacklevel=2)


def _place(staged: Staged, final: Mapping[str, str]) -> None:
    """Move everything into the directory; the last call is the flip."""
    directory, staging, names = staged.directory, staged.staging, staged.names
    for shard, name in final.items():
        os.replace(staging / shard, directory / name)
    single_is_there = os.path.isfile(directory / names.weights)
    if staged.shards and single_is_there:
        os.replace(staging / names.index, directory / names.index)
    for extra in staged.extras:
        # Left alone where nothing changes: re-saving during training then has no moment with a new config and old weights.
        if not _same(staging / extra, directory / extra):
            os.replace(staging / extra, directory / extra)
    sync_directory(directory)
    if not staged.shards:
        os.replace(staging / names.weights, directory / names.weights)
    elif single_is_there:
        os.unlink(directory / names.weights)
    else:
        os.replace(staging / names.index, directory / names.index)


def _flipped(staged: Staged) -> bool:
    """Whether a loader finds the new weights."""
    if not staged.shards:
        return not os.path.exists(staged.staging / staged.names.weights)
    moved = not os.path.exists(staged.staging / staged.names.index)
    return moved and not os.path.isfile(staged.directory / staged.names.weights)


def _undo(staged: Staged, final: Mapping[str, str]) -> None:
    """Take back what `_place` did before the flip: what is no longer in the staging directory has been moved."""
    for source, name in [*final.items(), *((name, name) for name in staged.replaced)]:
        if os.path.exists(staged.staging / source):
            continue
        try:
            if os.path.exists(backup := staged.staging / f"{name}{_BACKUP_SUFFIX}"):
                os.replace(backup, staged.directory / name)
            else:
                os.unlink(staged.directory / name)
        except OSError as error:
            warnings.warn(f"{staged.directory}: the earlier {name} could not be put back: {error}", stacklevel=2)


def _back_up(staged: Staged) -> None:
    """Copy the small files that will be replaced, while there is nothing to undo yet if the disk is full."""
    for name in staged.replaced:
        if os.path.isfile(staged.directory / name):
            write_synced(staged.staging / f"{name}{_BACKUP_SUFFIX}", (staged.directory / name).read_bytes())


def _remove_earlier(staged: Staged, keep: set[str]) -> None:
    """Remove the index (of a checkpoint that is one file now) and the shards that the new checkpoint does not have."""
    if not staged.shards and os.path.lexists(staged.directory / staged.names.index):
        os.unlink(staged.directory / staged.names.index)
    for file in sorted(os.listdir(staged.directory)):
        if staged.names.is_shard(file) and file not in keep:
            os.unlink(staged.directory / file)


def _restore_names(staged: Staged, final: Mapping[str, str]) -> None:
    """Give shards that were published under free names their ordinary ones."""
    renamed = {shard: name for shard, name in final.items() if shard != name}
    if not renamed:
        return
    try:
        for shard, name in renamed.items():
            os.link(staged.directory / name, staged.directory / shard)
    except OSError:
        # No hard links here. The names that are in use are as good; those linked so far are unreferenced.
        _remove_earlier(staged, set(final.values()))
        return
    write_synced(staged.staging / staged.names.index, _index(staged, {shard: shard for shard in final}))
    sync_directory(staged.directory)
    os.replace(staged.staging / staged.names.index, staged.directory / staged.names.index)
    sync_directory(staged.directory)
    _remove_earlier(staged, set(staged.shards))


def _free_names(staged: Staged) -> dict[str, str]:
    """For each shard the name it is published under: its own, or that of a generation the present index does not refer to."""
    taken = _referenced(staged.directory / staged.names.index)
    final = {shard: shard for shard in staged.shards}
    number = 1
    while taken.intersection(final.values()):
        number += 1
        final = {shard: staged.names.generation(shard, number) for shard in staged.shards}
    return final


def _referenced(index: Path) -> set[str]:
    """The files that an index names; none for an index that is not there or that no loader could read either."""
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _index(staged: Staged, final: Mapping[str, str]) -> bytes:
    weight_map = {tensor: final[shard] for tensor, shard in staged.weight_map.items()}
    index = {"metadata": dict(staged.metadata), "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _same(first: Path, second: Path) -> bool:
    return second.is_file() and first.read_bytes() == second.read_bytes()
