import torch
from torch import nn
from torch.nn import functional as F

import shardwise


class Attention(nn.Module):
    def __init__(self, width=48, heads=6):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_embd, self.n_head = width, heads

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.ln = Attention(), nn.LayerNorm(48)
        self.mlp = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48))

    def forward(self, x):
        x = x + self.attn(self.ln(x))
        return x + self.mlp(x)


model = nn.Sequential(nn.Embedding(101, 48), Block(), Block(), nn.Linear(48, 101))
plan = shardwise.infer_plan(model, tp_size=2, example_inputs={"input": torch.randint(101, (2, 16))})
print(plan)
plan.save("own.json")  # and under torchrun: shardwise.parallelize(model, plan=plan), or plan="own.json"
