"""One key of a checkpoint file, read in boxes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardwise.lazy import Box


@dataclass(frozen=True, slots=True, eq=False)
class FileSource:
    """One key of a file.

    Attributes:
        whole: gives the full tensor, over the mapped file where that can be mapped; keys that are one tensor share it.
        mapped: False where the file is read whole for a box of it.
    """

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    whole: Callable[[], Tensor]
    mapped: bool = True

    @property
    def name(self) -> str:
        """The key and its file, as error messages call it."""
        return f"{self.key} ({self.file.name})"

    def read(self, box: Box) -> Tensor:
        """The values in `box`: a view of the memory mapping, read-only by agreement."""
        tensor = self.whole()
        for dim, (start, stop) in enumerate(box):
            tensor = tensor.narrow(dim, start, stop - start)
        return tensor

    def __eq__(self, other: object) -> bool:
        """Whether both are one tensor of the file, by one key or by two."""
        return isinstance(other, FileSource) and self.whole is other.whole

    def __hash__(self) -> int:
        return hash(self.whole)
