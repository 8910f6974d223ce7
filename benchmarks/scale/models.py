"""The models, by their published sizes, and how each is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from transformers import DeepseekV3Config, LlamaConfig, PreTrainedConfig

_LLAMA = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LLAMA_70B = {
    **_LLAMA,
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}
LLAMA_405B = {
    **_LLAMA,
    "num_hidden_layers": 126,
    "hidden_size": 16384,
    "num_attention_heads": 128,
    "intermediate_size": 53248,
}
DEEPSEEK_V3 = {
    "vocab_size": 129280,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}

CONFIGS: Mapping[str, PreTrainedConfig] = MappingProxyType(
    {
        "Llama-3.3-70B": LlamaConfig(**LLAMA_70B),
        "Llama-3.1-405B": LlamaConfig(**LLAMA_405B),
        "Llama-3.1-405B, 63 layers": LlamaConfig(**{**LLAMA_405B, "num_hidden_layers": 63}),
        "DeepSeek-V3": DeepseekV3Config(**DEEPSEEK_V3),
    }
)
"""By name. The one of half the layers is there to show what grows with them."""


@dataclass(frozen=True)
class Case:
    """A model on `tp` ranks; with `ep`, its experts are dealt to so many."""

    model: str
    tp: int
    ep: int | None = None

    @property
    def ranks(self) -> int:
        """Ranks that hold the model once."""
        return max(self.tp, self.ep or 1)


CASES = (
    *(Case("Llama-3.3-70B", tp) for tp in (1, 2, 8, 16)),
    *(Case("Llama-3.1-405B", tp) for tp in (1, 2, 8, 16, 128)),
    Case("Llama-3.1-405B, 63 layers", 8),
    *(Case("DeepSeek-V3", tp) for tp in (1, 2, 8, 16)),
    Case("DeepSeek-V3", 8, 8),
    Case("DeepSeek-V3", 8, 64),
)
