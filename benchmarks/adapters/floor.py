"""The same model cut to one rank's shapes by hand, without any communication: what is left when that is free."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from benchmarks.adapters.base import Adapter
from benchmarks.floor import widen_head

DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size", "vocab_size")


class Floor(Adapter):
    """An ordinary model of local sizes, with random weights."""

    def start(self, size: int, fake: bool) -> None:
        """No process group."""
        self.size = size

    def build(self, folder: Path, expert_parallel: bool = False) -> PreTrainedModel:
        """A model whose layers have the shapes of one rank of `size`; only norms and routers are whole."""
        config = cut(AutoConfig.from_pretrained(folder), self.size)
        torch.manual_seed(0)
        return widen_head(AutoModelForCausalLM.from_config(config, dtype=config.dtype), self.size)


def cut(config: PreTrainedConfig, size: int) -> PreTrainedConfig:
    """The config of one rank's shapes, written into `config`."""
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in DIVIDED:
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name) // size)
    return config


ADAPTER = Floor()
