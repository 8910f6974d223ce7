"""Not a model: the bytes of one, written in one go. The bound of saving."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.adapters.whole import Whole


class Plain(Whole):
    """Every parameter's bytes, one behind the other, brought to the disk as shardwise does (`fsync`)."""

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """One file."""
        with (folder / "bytes").open("wb") as file:
            for parameter in model.parameters():
                file.write(parameter.detach().view(-1).view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())


ADAPTER = Plain()
