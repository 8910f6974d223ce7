"""The ten types of model that the tests run, tiny and random, as checkpoints, and the micro-batches that they are fed.

No size equals another one that it could be confused with, every parameter is random (norms and biases too), and there are
two KV heads for eight query heads, so that four ranks have to share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shardwise import tiny

COMMON: dict[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # no generation ends early
}
TYPES: dict[str, dict[str, object]] = {
    "llama": {"vocab_size": 127},  # a prime: no number of ranks divides it
    "mistral": {"sliding_window": 5},
    "qwen2": {"vocab_size": 127},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 12, "vocab_size": 127, "sliding_window": 5},  # tied
    "phi3": {},  # qkv and gate/up fused
    "starcoder2": {"use_bias": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 127, "output_router_logits": True},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "num_key_value_heads": 8,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    },
}


@dataclass(frozen=True)
class Batch:
    """A micro-batch: ids, mask and labels, each (batch, sequence) int64; a label of -100 is not counted."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def loss(self, model: nn.Module) -> Tensor:
        """The model's own loss."""
        loss: Tensor = model(input_ids=self.input_ids, attention_mask=self.attention_mask, labels=self.labels).loss
        return loss


def config(name: str, **overrides: object) -> PreTrainedConfig:
    """The config of a type in `TYPES`."""
    return AutoConfig.for_model(name, **{**COMMON, **TYPES[name], **overrides})


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a type in this process, in train mode; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(name), dtype=dtype)
        with torch.no_grad():
            for tensor in (*model.parameters(), *_correction_biases(model)):
                tensor.add_(torch.randn_like(tensor) * 0.05)
    return model.train()


def _correction_biases(model: nn.Module) -> Iterator[Tensor]:
    """Of DeepSeek's router: a buffer, zero in a new model."""
    return (tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias"))


def checkpoint(factory: pytest.TempPathFactory, name: str) -> Path:
    """A directory with the checkpoint of `build(name)`, or of a type not in `TYPES` of `tiny.build(name)`, written once
    a session.
    """
    path = factory.getbasetemp() / "checkpoints" / name
    if not path.exists():
        (build(name) if name in TYPES else tiny.build(name)).save_pretrained(path)
    return path


def batches(device: torch.device | str = "cpu") -> list[Batch]:
    """Three micro-batches of different shapes; the second is padded on the left, the third has labels that are not counted."""
    draw = torch.Generator().manual_seed(7)
    made = []
    for shape in ((2, 12), (3, 7), (1, 9)):
        ids = torch.randint(3, 127, shape, generator=draw)
        made.append(Batch(ids, torch.ones_like(ids), ids.clone()))
    made[1].attention_mask[0, :3] = 0
    made[1].labels[0, :3] = -100
    made[2].labels[0, 5:] = -100
    return [Batch(b.input_ids.to(device), b.attention_mask.to(device), b.labels.to(device)) for b in made]
