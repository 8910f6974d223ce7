"""A hidden directory beside the files that it will replace, and files in it that a power cut cannot take back."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shardwise.errors import CheckpointError, describe

if sys.platform != "win32":
    import fcntl

STAGING_PREFIX = ".shardwise-save-"


@contextlib.contextmanager
def open_staging(directory: Path) -> Iterator[Path]:
    """A fresh hidden sub-directory of `directory`, which is created where it isn't there; removed with its content at the end.

    Holds a lock on `directory`, so that staging directories found in it can only be leftovers of a crash: they are removed.
    Raises OSError where the directory cannot be made or written, CheckpointError where another process is saving into it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        for leftover in directory.glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(leftover)
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=directory))
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in `path` are on the disk. A filesystem that cannot do this for directories is left to itself."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's advisory lock; the system drops it when the process dies."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        _lock(handle, directory)
        yield
        # Processes forked in the meantime share the lock; closing alone would leave it to them.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


if sys.platform != "win32":

    def _lock(handle: int, directory: Path) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            headline = f"{directory}: another process is saving into this directory."
            raise CheckpointError(describe(headline, either=["wait until it is done, or", "save elsewhere"])) from None
        except OSError:
            pass  # a filesystem without locks: not saving there twice at once is the user's to see to
