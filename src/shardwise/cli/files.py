"""Options that name a file: what cannot be written or read is refused before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def to_write(path: Path | None) -> Path | None:
    """A file, or a folder, that can be written. Its own folder may have to be made, and is.

    Raises `typer.BadParameter` where that is not possible.
    """
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{path}: the folder {path.parent} cannot be made: {error.strerror}.") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written: permission denied.")
    return path
