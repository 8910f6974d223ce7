"""A loop in which one rank has a batch less."""

import torch
from transformers import LlamaConfig

import shardwise

config = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128
)
model = shardwise.AutoModelForCausalLM.from_config(config, tp_plan="auto").train()
batches = torch.arange(1, 97).view(3, 2, 16)
if torch.distributed.get_rank() == 1:
    batches = batches[:2]  # what a data loader does that deals an odd number of batches to the ranks
with shardwise.trace_collectives(check=True, timeout=10.0):
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
    shardwise.clip_grad_norm_(model, max_norm=1.0)
