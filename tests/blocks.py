"""Small modules, and the check that one of them, made parallel, computes what it computes alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import silu, softmax
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import shardwise
from shardwise.layout import Sharded
from shardwise.model_state import required_state
from shardwise.plan import Plan
from shardwise.testing import RankError


def tp_axis() -> DeviceMesh:
    """All ranks as the tp axis."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def x(*shape: int) -> Tensor:
    """Random float64."""
    return torch.randn(*shape, dtype=torch.float64)


def fails(check: Callable[[], None]) -> None:
    """The check bites: it raises, with a defect in place."""
    with pytest.raises((AssertionError, RankError)):
        check()


def randomize(module: nn.Module) -> nn.Module:
    """Random float64 everywhere, biases and norms too; the row of a padding index stays zero."""
    module.double()
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(torch.randn_like(tensor) / 2)
        for part in module.modules():
            if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                part.weight[part.padding_idx] = 0
    return module


@dataclass(frozen=True)
class Seen:
    """What came of some backward passes: the output of the last, the inputs' gradients, the parameters' gradients by name."""

    output: Tensor
    inputs: list[Tensor]
    gradients: dict[str, Tensor | None]


def train(module: nn.Module, batches: Sequence[Sequence[Tensor]], weight: Tensor) -> Seen:
    """Backward of each batch, accumulated; the loss is the sum of the outputs times `weight`."""
    inputs = []
    for batch in batches:
        leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in batch]
        output = module(*[x * 1 if x.is_floating_point() else x for x in leaves])
        (output * weight).sum().backward()
        inputs += [x.grad for x in leaves if x.grad is not None]
    return Seen(output.detach(), inputs, {name: p.grad for name, p in module.named_parameters()})


def weights_like(full: Tensor) -> Tensor:
    """A weight for each element of an output, so that a loss tells them apart."""
    return torch.linspace(-1, 2, full.numel(), dtype=full.dtype).mul(7).sin().view(full.shape)


def _on_a_rank(
    module: nn.Module, plan: Mapping[str, str], batches: Sequence[Sequence[Tensor]], full: Tensor, cut: Sharded | None
) -> tuple[Seen, Plan]:
    mesh, rank = tp_axis(), dist.get_rank()
    model = shardwise.parallelize(copy.deepcopy(module), mesh, plan=plan)
    weight = weights_like(full) if cut is None else cut.shard(weights_like(full), rank, mesh.size())
    return train(model, batches, weight), required_state(model).plan


def check_parity(
    threads: Callable[..., list],
    size: int,
    module: nn.Module,
    plan: Mapping[str, str],
    *batches: Sequence[Tensor],
    cut: Sharded | None = None,
    tolerance: float = 1e-9,
) -> None:
    """Output, input gradients and parameter gradients of `module` under `plan` on `size` ranks are those of one process.

    Args:
        batches: the arguments of each call; their gradients accumulate.
        cut: how the output lies on the ranks, None where all have it whole.

        tolerance: absolute and relative.

    For float64 modules the tolerance is far below any defect: a term too many or too few is some percent.
    """
    with torch.no_grad():
        full = module(*batches[-1])
    alone = train(copy.deepcopy(module), batches, weights_like(full))
    found = threads(_on_a_rank, size, module, plan, batches, full, cut)
    for rank, (seen, table) in enumerate(found):
        local = alone.output if cut is None else cut.shard(alone.output, rank, size)
        assert_close(
            seen.output, local, rtol=tolerance, atol=tolerance, msg=lambda text, rank=rank: f"output, rank {rank}: {text}"
        )
        assert len(seen.inputs) == len(alone.inputs)
        for ours, theirs in zip(seen.inputs, alone.inputs, strict=True):
            assert_close(
                ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text, rank=rank: f"input, rank {rank}: {text}"
            )
        for name, gradient in alone.gradients.items():
            ours = seen.gradients[name]
            assert (ours is None or not ours.any()) if gradient is None else ours is not None, name
            if gradient is not None:
                theirs = table[name].layout.shard(gradient, rank, size)
                assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda t, n=name, r=rank: f"{n}, rank {r}: {t}")
    if cut is None:
        assert all(torch.equal(seen.output, found[0][0].output) for seen, _ in found)
    assert all(
        torch.equal(ours, theirs) for seen, _ in found for ours, theirs in zip(seen.inputs, found[0][0].inputs, strict=True)
    )


def dense_layer(kind: str, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    """A linear layer as torch has it, or as GPT-2 does."""
    return nn.Linear(inputs, outputs, bias) if kind == "linear" else Conv1D(outputs, inputs)


class Mlp(nn.Module):
    """up, activation, down."""

    def __init__(self, width: int = 6, hidden: int = 7, kind: str = "linear", bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = dense_layer(kind, width, hidden, bias), dense_layer(kind, hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.down(torch.tanh(self.up(x)))


class GatedMlp(nn.Module):
    """gate and up in one matrix."""

    def __init__(self, width: int = 6, hidden: int = 5, kind: str = "linear", bias: bool = True) -> None:
        super().__init__()
        self.gate_up, self.down = dense_layer(kind, width, 2 * hidden, bias), dense_layer(kind, hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(silu(gate) * up)


class TwoHalves(nn.Module):
    """A layer whose inputs are two fused halves."""

    def __init__(self, width: int = 6, hidden: int = 5, kind: str = "linear", bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = dense_layer(kind, width, hidden, bias), dense_layer(kind, width, hidden, bias)
        self.down = dense_layer(kind, 2 * hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.down(torch.cat([self.a(x).sin(), self.b(x).cos()], -1))


class Attention(nn.Module):
    """q, k, v, o with grouped heads, norms over each head, and a sink a head: what attention modules are made of."""

    def __init__(self, width: int = 12, heads: int = 4, kv_heads: int = 4, head_dim: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, kv_heads, head_dim
        self.num_key_value_groups, self.attention_dropout = heads // kv_heads, dropout
        self.q_proj = nn.Linear(width, heads * head_dim)
        self.k_proj = nn.Linear(width, kv_heads * head_dim)
        self.v_proj = nn.Linear(width, kv_heads * head_dim)
        self.o_proj = nn.Linear(heads * head_dim, width)
        self.q_norm, self.k_norm = nn.LayerNorm(head_dim), nn.LayerNorm(head_dim)
        self.sinks = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) -> the same."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        k, v = (t.repeat_interleave(self.num_key_value_groups, 1) for t in (k, v))
        scores = q @ k.mT + self.sinks.view(1, -1, 1, 1) * q.sum(-1, keepdim=True)
        masks = nn.functional.dropout(softmax(scores, -1), self.attention_dropout, self.training)
        return self.o_proj((masks @ v).transpose(1, 2).flatten(2))


ATTENTION_PLAN = {
    "q_proj": "colwise",
    "k_proj": "colwise",
    "v_proj": "colwise",
    "o_proj": "rowwise",
    "q_norm": "replicated_with_grad_allreduce",
    "k_norm": "replicated_with_grad_allreduce",
    "sinks": "colwise",
}


def under(prefix: str, plan: Mapping[str, str]) -> dict[str, str]:
    """The plan of a module for its parent."""
    return {f"{prefix}.{pattern}": style for pattern, style in plan.items()}
