"""shardwise: `from_pretrained` of its Auto class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

import shardwise
from benchmarks.adapters.base import Adapter
from shardwise.checkpoint import FileSource
from shardwise.mesh import tp_mesh
from shardwise.testing.fake import fake_rank


class Ours(Adapter):
    """Plain tensors."""

    def start(self, size: int, fake: bool) -> None:
        """The process group that shardwise chooses."""
        self.size = size
        if fake:
            self.group = ExitStack()  # kept: the group is there as long as the process
            self.group.enter_context(fake_rank(size))
        else:
            tp_mesh()

    def build(self, folder: Path, expert_parallel: bool = False) -> PreTrainedModel:
        """Each rank reads its own shards."""
        ep_size = self.size if expert_parallel else None
        return shardwise.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", ep_size=ep_size)

    @contextmanager
    def bytes_asked(self) -> Iterator[list[int]]:
        """Of each range that is read from a safetensors file."""
        asked: list[int] = []
        real = FileSource.read

        def read(source: FileSource, box: tuple[tuple[int, int], ...]) -> Tensor:
            asked.append(prod(stop - start for start, stop in box) * source.dtype.itemsize)
            return real(source, box)

        FileSource.read = read
        try:
            yield asked
        finally:
            FileSource.read = real

    def clip(self, model: nn.Module, max_norm: float) -> None:
        """By the norm of the whole model."""
        shardwise.clip_grad_norm_(model, max_norm)


ADAPTER = Ours()
