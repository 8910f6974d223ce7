import shardwise
from shardwise import tiny

model = tiny.build("qwen3")  # a small random model of the type
plan = shardwise.plan(model, 2, {"layers.*.self_attn.k_norm": "replicate"})  # of which each rank sees half of the heads
shardwise.prove(plan, model)
