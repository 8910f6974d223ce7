"""Not a model: a rank's share of a checkpoint's bytes, copied into memory of its own. The bound of loading."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import safe_open
from torch import nn

from benchmarks.adapters.base import Adapter


class Copied(Adapter):
    """What lies next to each other in the file: an equal part of the rows of every tensor."""

    def start(self, size: int, fake: bool) -> None:
        """No process group."""
        self.rank, self.size = int(os.environ["RANK"]), size

    def build(self, folder: Path, expert_parallel: bool = False) -> nn.Module:
        """The copies, as parameters of nothing."""
        copies = nn.Module()
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is not a dict)
                    rows = file.get_slice(name)
                    length = rows.get_shape()[0]
                    mine = rows[self.rank * length // self.size : (self.rank + 1) * length // self.size]
                    copies.register_parameter(name.replace(".", "-"), nn.Parameter(mine.clone(), requires_grad=False))
        return copies


ADAPTER = Copied()
