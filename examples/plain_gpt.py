"""A GPT in plain torch, made parallel by what it computes: nobody wrote a plan for it.

    torchrun --nproc-per-node 2 examples/plain_gpt.py

Prints the inferred plan, trains the model on two ranks and beside it on one, and says how far the two are apart.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 96, 64, 4, 2, 24
NOISE = 1e-4  # of float32, after a few steps of AdamW, relative to the loss


class Attention(nn.Module):
    """Causal attention; q, k and v are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) -> the same."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, each with a norm before and a residual around."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) -> the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Token ids (batch, sequence) -> logits (batch, sequence, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The logits of the next token at each position."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def train(model: nn.Module, steps: int) -> list[float]:
    """The losses of some steps of two accumulated micro-batches, the same texts for every model and rank."""
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        for _ in range(2):
            ids = torch.randint(VOCABULARY, (4, LENGTH), generator=generator)
            loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            losses.append(loss.item())
        shardwise.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def inferred(model: GPT, size: int) -> shardwise.Plan:
    """The plan for `model` on `size` ranks, proven on these inputs."""
    return shardwise.infer_plan(model, tp_size=size, example_inputs={"ids": torch.arange(2 * LENGTH).view(2, LENGTH)})


def main() -> int:
    """Train on every rank, and on each alone beside it; 0 where both give the same losses."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = GPT()
    alone = train(copy.deepcopy(model), steps=3)
    plan = inferred(model, dist.get_world_size())
    parallel = train(shardwise.parallelize(model, plan=plan), steps=3)
    apart = max(abs(one - other) for one, other in zip(alone, parallel, strict=True))
    if dist.get_rank() == 0:
        print(plan)
        print(f"losses on {plan.size} ranks: {', '.join(f'{loss:.4f}' for loss in parallel)}")
        print(f"on one, at most {apart:.1e} apart")
    dist.destroy_process_group()
    return 0 if apart < NOISE else 1


if __name__ == "__main__":
    sys.exit(main())
