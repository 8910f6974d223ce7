"""The styles `local_width` and `colwise_whole_input`: attention that takes its width from its input's shape.

That they are exact is shown in test_plain_models.py.
"""

from __future__ import annotations

import torch
from torch import nn

import shardwise
from plain import GPT, VOCABULARY, WIDTH, Gated, NanoAttention
from shardwise.plan import Plan
from shardwise.testing import RankPool


def compiled_on_rank(model: nn.Module, plan: Plan, x: torch.Tensor) -> float:
    """How far compiled code is from eager code: outputs, and the input's gradient."""
    shardwise.parallelize(model, plan=plan)
    found = []
    for called in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        given = x.clone().requires_grad_()
        output = called(given)
        output.square().sum().backward()
        found.append((output, given.grad))
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


def test_local_width_compiles(pool2: RankPool):
    """Guards: a stand-in that breaks the graph, or that compiled code takes for the input: all would be NaN."""
    x = torch.randn(2, 9, WIDTH)
    model = nn.Sequential(NanoAttention())
    plan = shardwise.infer_plan(model, 2, {"input": x})
    assert [row.rule.style for row in plan.modules] == ["local_width", "colwise_whole_input", "rowwise"]
    assert max(pool2.run(compiled_on_rank, model, plan, x)) < 1e-5


def test_a_width_that_is_used_otherwise_is_noticed():
    """Guards: code that is told a rank's width, and scales by it: it keeps the width that it has."""

    class Scaled(NanoAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x / x.shape[-1])

    model = GPT(Scaled, Gated)
    plan = shardwise.infer_plan(model, 2, {"ids": torch.randint(VOCABULARY, (2, 9))})
    assert plan["h.0.first.c_attn.weight"].rule.style == "colwise_gather_output"
