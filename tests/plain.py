"""Models in plain torch, written as people write them; for inference to be tried on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, VOCABULARY, LENGTH = 48, 6, 101, 16


class NanoAttention(nn.Module):
    """Attention as in nanoGPT: it takes the width of its heads from its input's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.n_head, self.n_embd = HEADS, WIDTH

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class ViTAttention(nn.Module):
    """Attention as in vision transformers: one reshape for q, k and v, and a softmax written out."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = HEADS, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class HeadByHead(nn.Module):
    """Attention as in introductions: a list of heads, each with layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        heads = ({name: nn.Linear(WIDTH, size) for name in ("q", "k", "v")} for _ in range(HEADS))
        self.heads, self.out = nn.ModuleList(map(nn.ModuleDict, heads)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = (F.scaled_dot_product_attention(h["q"](x), h["k"](x), h["v"](x), is_causal=True) for h in self.heads)
        return self.out(torch.cat(list(parts), -1))


class GroupedAttention(nn.Module):
    """Attention as in Llama: fewer heads of keys and values, and norms of queries and keys."""

    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.n_heads, self.n_kv, self.head_dim = heads, 2, WIDTH // heads
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, self.n_kv * self.head_dim, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_norm(self.wq(x).view(b, n, self.n_heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.wk(x).view(b, n, self.n_kv, self.head_dim)).transpose(1, 2)
        v = self.wv(x).view(b, n, self.n_kv, self.head_dim).transpose(1, 2)
        k, v = (part.repeat_interleave(self.n_heads // self.n_kv, dim=1) for part in (k, v))
        return self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, -1))


class SharedKeys(GroupedAttention):
    """Two heads of keys and values for eight of queries."""

    def __init__(self) -> None:
        super().__init__(heads=8)


class Inline(nn.Module):
    """A block in one module: attention with ALiBi that takes its width from its input, which it adds itself, and an MLP."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down, self.heads = nn.Linear(WIDTH, 80), nn.Linear(80, WIDTH), HEADS
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, HEADS + 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        b, n, c = h.shape
        q, k, v = self.qkv(h).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.slopes[:, None, None] * (torch.arange(n) - torch.arange(n)[:, None])
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(b, n, c))
        return x + self.down(F.gelu(self.up(x)))


class TorchAttention(nn.Module):
    """torch's own attention, with a mask for each head, padding, and the weights of all heads in its output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, kdim=20, vdim=20, add_bias_kv=True, add_zero_attn=True)

    def forward(self, x: Tensor) -> Tensor:
        n, b, _ = x.shape
        memory = x[:4, :, :20]
        mask = (torch.arange(b * HEADS * n * 4) % 3 == 0).view(b * HEADS, n, 4)
        padding = torch.arange(4).expand(b, 4) > 2 + torch.arange(b)[:, None]
        found, weights = self.inner(x, memory, memory, padding, attn_mask=mask, average_attn_weights=False)
        return x + found + weights.mean((1, 2, 3))[None, :, None]


class TorchAttentionByHeads(nn.Module):
    """torch's own attention, with a mask that is repeated for as many heads as it says that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(len(x), x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        found: Tensor = self.inner(x, x, x, attn_mask=mask.repeat_interleave(self.inner.num_heads, 0), need_weights=False)[0]
        return found


class TorchLayers(nn.Module):
    """torch's own encoder, which in evaluation calls a fused kernel, and hands nested tensors on where there is padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 80, dropout=0.0, batch_first=True)
        self.inner = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]).expand(x.shape[:2]) > 5
        return self.inner(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)


class StackedMixture(nn.Module):
    """Experts in one parameter, multiplied by in einsum, and their router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up, self.down = (nn.Parameter(torch.randn(4, *shape) * 0.1) for shape in ((WIDTH, 40), (40, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        hidden = F.gelu(torch.einsum("bnd,edf->benf", x, self.up))
        return torch.einsum("bend,bne->bnd", torch.einsum("benf,efd->bend", hidden, self.down), weights)


class Listed(nn.Module):
    """An MLP whose matrices are in a list, and one that reads its matrices in halves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weights = nn.LayerNorm(WIDTH), nn.ParameterList()
        self.weights.extend([torch.randn(WIDTH, 80) * 0.1, torch.randn(80, WIDTH) * 0.1])
        self.up, self.down = (nn.Parameter(torch.randn(80, WIDTH) * 0.1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + F.gelu(x @ self.weights[0]) @ self.weights[1])
        for up, down in zip(self.up.chunk(2), self.down.chunk(2), strict=True):
            x = x + F.linear(x, up).relu() @ down
        return x


class Gated(nn.Module):
    """An MLP with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(WIDTH, 80), nn.Linear(WIDTH, 80), nn.Linear(80, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """A list of experts, two of which a token takes."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 40), nn.SiLU(), nn.Linear(40, WIDTH)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        parts = ((weights * (chosen == n)).sum(-1, keepdim=True) * expert(x) for n, expert in enumerate(self.experts))
        return sum(parts, torch.zeros_like(x))


class Block(nn.Module):
    """Two parts, each with a norm before and a residual around."""

    def __init__(self, first: type[nn.Module], second: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.norms = first(), second(), nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.norms[0](x))
        return x + self.second(self.norms[1](x))


class GPT(nn.Module):
    """Ids (batch, length) -> logits (batch, length, VOCABULARY); the head is tied to the embedding."""

    def __init__(self, attention: type[nn.Module], mlp: type[nn.Module]) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList(Block(attention, mlp) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class ViT(nn.Module):
    """Images (batch, 3, 16, 16) -> logits (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, WIDTH, 4, 4), nn.ModuleList(Block(ViTAttention, Gated) for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Layers(nn.Sequential):
    """Rows (batch, 32) -> the same."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@dataclass(frozen=True)
class Case:
    """A model, its input, how much of its elements at least is cut on two ranks, and by which styles among others."""

    make: Callable[[], nn.Module]
    name: str
    shape: tuple[int, ...]
    share: float
    styles: frozenset[str]

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.name == "ids":
            return {"ids": torch.randint(VOCABULARY, self.shape, generator=generator)}
        return {self.name: torch.randn(self.shape, generator=generator)}


WIDTH_STYLES = frozenset({"local_width", "colwise_whole_input", "rowwise"})
CASES = {
    "nanoGPT": Case(lambda: GPT(NanoAttention, Gated), "ids", (2, 9), 0.96, WIDTH_STYLES | {"embedding_rowwise"}),
    "grouped": Case(lambda: GPT(GroupedAttention, Gated), "ids", (2, 9), 0.96, frozenset({"colwise", "rowwise"})),
    "mixture": Case(lambda: GPT(GroupedAttention, Mixture), "ids", (2, 9), 0.95, frozenset({"colwise", "rowwise"})),
    "head by head": Case(lambda: GPT(HeadByHead, Gated), "ids", (2, 9), 0.96, frozenset({"colwise_gather_output"})),
    "ViT": Case(ViT, "images", (2, 3, 16, 16), 0.9, WIDTH_STYLES),
    "inline": Case(lambda: GPT(Inline, Gated), "ids", (2, 9), 0.96, WIDTH_STYLES),
    "shared keys": Case(
        lambda: GPT(lambda: GroupedAttention(8), Gated), "ids", (2, 9), 0.96, frozenset({"colwise", "rowwise"})
    ),
    "torch attention": Case(TorchAttention, "x", (9, 2, WIDTH), 0.95, frozenset({"local_multihead"})),
    "torch attention by heads": Case(TorchAttentionByHeads, "x", (2, 9, WIDTH), 0.95, frozenset({"local_multihead"})),
    "torch layers": Case(TorchLayers, "x", (2, 9, WIDTH), 0.95, frozenset({"local_multihead"})),
    "stacked mixture": Case(StackedMixture, "x", (2, 9, WIDTH), 0.95, frozenset({"products"})),
    "listed": Case(Listed, "x", (2, 9, WIDTH), 0.95, frozenset({"products"})),
    "layers": Case(Layers, "x", (4, 32), 0.95, frozenset({"colwise", "rowwise"})),
}
