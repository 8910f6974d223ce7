"""What the tests of `sequence_parallel=True` share: models by type, on one process and split, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import models
import shardwise
from blocks import tp_axis
from figures import Figures, gradients, measure
from models import COMMON, Batch
from shardwise.layers import SequenceLayer, SequenceRegion, SequenceWhole

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OTHERS: dict[str, dict[str, object]] = {
    "gemma3_text": {"head_dim": 12, "sliding_window": 5},  # four norms a layer
    "olmo2": {},  # norms behind attention and MLP, and over all heads
    "gpt2": {"num_key_value_heads": None, "n_positions": 48, "loss_type": "ForCausalLM", **NO_DROPOUT},  # biases everywhere
}
WHOLE = {"olmo2", "mixtral", "qwen3_moe", "deepseek_v3"}  # those that have modules with more than split linear layers


def config(name: str, **changes: object) -> PreTrainedConfig:
    """Of a type in `models.TYPES` or in `OTHERS`."""
    own = OTHERS.get(name, models.TYPES.get(name))
    return AutoConfig.for_model(name, **{**COMMON, **own, **changes})


def build(name: str, **changes: object) -> PreTrainedModel:
    """The ordinary model, random everywhere, in train mode; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(name, **changes), dtype=torch.float32)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(torch.randn_like(tensor) * 0.05)
    return model.train()


def split(name: str, **changes: object) -> PreTrainedModel:
    """On a rank: its part, sequence parallel."""
    return shardwise.parallelize(build(name, **changes), tp_axis(), sequence_parallel=True)


def measure_split(name: str) -> tuple[Figures, set[str]]:
    """On a rank: what a type gives, and the classes that took part."""
    model = split(name)
    kinds = {
        kind.__name__ for kind in (SequenceLayer, SequenceRegion, SequenceWhole) for m in model.modules() if isinstance(m, kind)
    }
    return measure(model), kinds


def train(model: nn.Module, *data: Batch) -> dict[str, Tensor] | None:
    """The full gradients after some micro-batches, on the first rank."""
    for batch in data:
        batch.loss(model).backward()
    return gradients(model)


def of_length(length: int) -> Batch:
    """Two sequences."""
    ids = torch.randint(3, 127, (2, length), generator=torch.Generator().manual_seed(length))
    return Batch(ids, torch.ones_like(ids), ids.clone())
