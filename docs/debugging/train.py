"""Two micro-batches, accumulated, on a tiny Qwen3 with the plan of plan.json."""

import json
import sys
from pathlib import Path

import norms  # registers the style
import torch
from transformers import Qwen3Config

import shardwise

config = Qwen3Config(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128
)
plan = json.loads(Path("plan.json").read_text())
model = shardwise.AutoModelForCausalLM.from_config(config, tp_plan=plan).train()
if "stop" in sys.argv:
    shardwise.break_on("model.layers.0.*q_norm", phase="backward", rank=0)
for ids in torch.arange(1, 33).view(2, 1, 16):
    with shardwise.trace_collectives() as trace:
        model(input_ids=ids, labels=ids).loss.backward()
if "trace" in sys.argv and torch.distributed.get_rank() == 0:
    print(trace)
