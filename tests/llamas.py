"""The tiny sizes that several tests share, and a llama of them."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
IDS = torch.arange(3, 27).view(2, 12)


def llama(**changes: object) -> LlamaForCausalLM:
    """A tiny one."""
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**TINY, **changes}))
