"""What an adapter can be asked for, and what most of them do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel


class Adapter:
    """One way to run the model whose checkpoint lies in a folder."""

    def start(self, size: int, fake: bool) -> None:
        """Before anything else: the process group of `size` ranks, where the contender does not start it by itself."""
        if fake:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)

    def build(self, folder: Path, expert_parallel: bool = False) -> PreTrainedModel:
        """This rank's model with the weights in `folder`, in the dtype of its config. Collective."""
        raise NotImplementedError

    @contextmanager
    def bytes_asked(self) -> Iterator[list[int]]:
        """In the block, how many bytes of its files each read asks for; empty where nothing counts them."""
        yield []

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the ordinary checkpoint. Collective."""
        model.save_pretrained(folder)

    def clip(self, model: nn.Module, max_norm: float) -> None:
        """Clip the gradients by their norm, as one would with this contender. Collective.

        Norms of DTensors and of other tensors are taken apart, as torch refuses to mix them, and put together.
        """
        groups: dict[type, list[nn.Parameter]] = {}
        for parameter in model.parameters():
            groups.setdefault(type(parameter.data), []).append(parameter)
        norms = [torch.nn.utils.get_total_norm([one.grad for one in group]) for group in groups.values()]
        norm = torch.linalg.vector_norm(torch.stack([getattr(one, "full_tensor", lambda one=one: one)() for one in norms]))
        for group in groups.values():
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)


def shapes(folder: Path) -> dict[str, object]:
    """The config in a folder."""
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found
