"""Real text as bytes: the Python sources that are on every machine, or what the user names."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardwise.errors import ShardwiseError, describe

LIMIT = 4_000_000
"""Bytes of text that are used; more would not be seen in a run of this length."""

_MINIMUM = 20_000
_HELD_OUT = 0.05
_SKIPPED = frozenset({"test", "tests", "idle_test", "lib2to3", "site-packages", "encodings", "pydoc_data"})
_LONGER_LINE, _LINE_END = 24, 120


@dataclass(frozen=True)
class Text:
    """Text as tokens.

    Args:
        name: where it is from, in words.
        training: (bytes,) uint8.
        held_out: (bytes,) uint8, never trained on: the end of the text.
        prompt: what the trained model is asked to go on with; a part of `held_out`.
    """

    name: str
    training: Tensor
    held_out: Tensor
    prompt: str

    def batch(self, step: int, batch: int, length: int, seed: int) -> Tensor:
        """The tokens of training step `step`: (batch, length) int64, the same for the same arguments everywhere."""
        return _windows(self.training, batch, length, torch.Generator().manual_seed(seed * 1_000_003 + step))

    def held_out_batch(self, batch: int, length: int) -> Tensor:
        """Tokens of the held-out text: (batch, length) int64, always the same."""
        return _windows(self.held_out, batch, length, torch.Generator().manual_seed(0))


def read_text(path: Path | None = None, limit: int = LIMIT) -> Text:
    """At most `limit` bytes of the file `path`, of the folder `path` (its files by name), or of the standard library's sources.

    Raises `ShardwiseError` where there is no such path or too little in it.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in sorted(root.rglob("*.py")) if not _SKIPPED & set(file.relative_to(root).parts)]
        random.Random(0).shuffle(files)  # or the held-out text would be of another kind: its neighbours in the alphabet
        name = "Python's standard library"
    else:
        if not path.exists():
            raise ShardwiseError(f"--text {path}: no such file or folder.")
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        name = str(path)
    data = _read(files, limit)
    if len(data) < _MINIMUM:
        raise ShardwiseError(
            describe(
                f"{name}: {len(data)} bytes of text are too few to train on; the demo wants {_MINIMUM} or more.",
                either=["--text with a longer file, or a folder of them, or", "no --text: Python's own sources are used"],
            )
        )
    cut = int(len(data) * (1 - _HELD_OUT))
    tokens = torch.frombuffer(data, dtype=torch.uint8)
    return Text(name, tokens[:cut], tokens[cut:], _prompt(bytes(data[cut:])))


def _read(files: Iterable[Path], limit: int) -> bytearray:
    data = bytearray()
    for file in files:
        data += file.read_bytes()
        if len(data) >= limit:
            break
    return data[:limit]


def _prompt(held_out: bytes) -> str:
    """The first longer line of the held-out text (of Python sources: of the first function), and half of the next line."""
    lines = held_out.decode("utf-8", errors="ignore").splitlines()[1:]
    lines = [line[:_LINE_END] for line in lines if line.strip()] or ["The", "end"]
    longer = [i for i, line in enumerate(lines[:-1]) if len(line) >= _LONGER_LINE] or [0]
    start = next((i for i in longer if lines[i].lstrip().startswith("def ")), longer[0])
    following = lines[min(start + 1, len(lines) - 1)]
    indent = len(following) - len(following.lstrip())
    return f"{lines[start]}\n{following[: (indent + len(following) + 1) // 2]}"


def _windows(tokens: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(tokens) - length, (batch,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()]).long()
