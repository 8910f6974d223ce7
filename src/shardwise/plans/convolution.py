"""Short convolutions (LFM2): every channel is computed alone, between a projection to three matrices and one back."""

from __future__ import annotations

from torch import nn

from shardwise.layers import Cut
from shardwise.layout import Block
from shardwise.plan import wildcard
from shardwise.plans.parts import attention, mlp
from shardwise.spec import Rule

_PATH = "layers.*.conv"
_REASON = "a short convolution, cut between its channels"


def lfm2(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """Attention and dense MLPs, and a short convolution in the other layers."""
    return [*attention(model, prefix, output="out_proj"), *_common(model, prefix)]


def lfm3(model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """As LFM2; optionally a gate for each attention head."""
    return [*attention(model, prefix, also=["g_proj"]), *_common(model, prefix)]


def _common(model: nn.Module, prefix: str) -> list[Rule]:
    return [*mlp(prefix, "layers.*.feed_forward", ("w1", "w3"), "w2"), *_convolutions(model, prefix)]


def _convolutions(model: nn.Module, prefix: str) -> list[Rule]:
    found: list[Rule] = []
    for name, module in model.named_modules():
        if wildcard(name) == _PATH:
            width = module.get_submodule("out_proj").in_features
            assert isinstance(width, int)
            three = Cut(blocks=(Block(width),) * 3)
            found += [
                Rule(f"{prefix}{name}.in_proj", "packed_colwise", "shardwise", three, reason=f"{_REASON}: B | C | x"),
                Rule(f"{prefix}{name}.conv", "local_rows", "shardwise", reason=_REASON),
                Rule(f"{prefix}{name}.out_proj", "rowwise", "shardwise", reason="reads the local channels"),
            ]
    return found
