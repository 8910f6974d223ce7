"""Telling one checkpoint from another without reading it."""

from __future__ import annotations

import hashlib

from shardwise.checkpoint.find import CheckpointFiles

_SAMPLE_BYTES = 2**16


def fingerprint(checkpoint: CheckpointFiles) -> str:
    """A text that stands for the checkpoint's content: each file's name and size, and its first and last 64 KiB."""
    state = hashlib.sha256()
    for path in checkpoint.files:
        size = path.stat().st_size
        state.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            state.update(file.read(_SAMPLE_BYTES))
            file.seek(max(size - _SAMPLE_BYTES, 0))
            state.update(file.read(_SAMPLE_BYTES))
    return state.hexdigest()
