"""transformers' own tensor parallelism: up to 5.15 plain tensors with hooks, from 5.16 DTensors."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import __version__ as version
from transformers.distributed import DistributedConfig

from benchmarks.adapters.base import Adapter

USES_DTENSORS = tuple(map(int, version.split(".")[:2])) >= (5, 16)


class Transformers(Adapter):
    """`tp_plan="auto"`. The process group is the one that `from_pretrained` starts."""

    def start(self, size: int, fake: bool) -> None:
        """See above."""
        self.size = size
        super().start(size, fake)

    def build(self, folder: Path, expert_parallel: bool = False) -> PreTrainedModel:
        """What each version's documentation says."""
        if USES_DTENSORS:
            ep_size = {"ep_size": self.size} if expert_parallel else {}
            config = DistributedConfig(tp_size=self.size, tp_plan="auto", **ep_size)
            return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
        if expert_parallel:
            config = DistributedConfig(enable_expert_parallel=True)
            return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", distributed_config=config)
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")


ADAPTER = Transformers()
