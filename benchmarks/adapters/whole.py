"""One process with the whole model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.adapters.base import Adapter


class Whole(Adapter):
    """transformers, as it is."""

    def start(self, size: int, fake: bool) -> None:
        """No process group."""

    def build(self, folder: Path, expert_parallel: bool = False) -> PreTrainedModel:
        """The ordinary model."""
        return AutoModelForCausalLM.from_pretrained(folder)


ADAPTER = Whole()
