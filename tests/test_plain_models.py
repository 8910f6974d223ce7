"""Plans that are inferred for models in plain torch, as people write them: exact, and undone without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardwise
from plain import CASES, Case
from shardwise.infer.unknown import cut_share
from shardwise.plan import Plan

MICRO_BATCHES = 3


def made(case: Case) -> nn.Module:
    """The same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case.make()


def train(model: nn.Module, case: Case) -> list[torch.Tensor]:
    """The outputs of an evaluation, and of some accumulated micro-batches."""
    with torch.no_grad():
        outputs = [model.eval()(**case.inputs(MICRO_BATCHES))]
    model.train()
    for seed in range(MICRO_BATCHES):
        outputs.append(model(**case.inputs(seed)))
        outputs[-1].square().mean().backward()
    return [output.detach() for output in outputs]


def on_rank(name: str, plan: Plan, ordinary: nn.Module) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None]]:
    """The outputs of a sharded model, which is the ordinary one afterwards, and its local gradients."""
    case, mesh = CASES[name], init_device_mesh("cpu", (plan.size,), mesh_dim_names=("tp",))
    model = copy.deepcopy(ordinary)
    before = {key: copy.copy(vars(module)) for key, module in model.named_modules()}
    shardwise.parallelize(model, mesh, plan)
    outputs, gradients = train(model, case), {key: p.grad for key, p in model.named_parameters()}
    shardwise.unparallelize(model)
    assert {key: vars(module).keys() for key, module in model.named_modules()} == {k: v.keys() for k, v in before.items()}
    for (key, value), expected in zip(model.state_dict().items(), ordinary.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key
    return outputs, gradients


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which torch's encoder makes in evaluation
@pytest.mark.parametrize(("name", "size"), [(name, size) for name in CASES for size in (2, 3)] + [("shared keys", 4)])
def test_exact(name, size, threads):
    """Guards: a plan that cuts little of ordinary code, or is right in one micro-batch alone; attributes that stay behind;
    ranks that share a head of keys, whose gradients nobody sums; a fused kernel that takes a rank's heads for all of them.
    """
    case = CASES[name]
    plan = shardwise.infer_plan(made(case), size, case.inputs())
    assert cut_share(plan) > case.share
    if size != 3:
        assert case.styles <= {row.rule.style for row in (*plan, *plan.modules) if row.rule is not None}
    model = made(case)
    ranks = threads(on_rank, size, name, plan, model)
    expected = train(model, case)
    for rank, (outputs, gradients) in enumerate(ranks):
        for output, right in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, right, rtol=1e-4, atol=1e-5)
        for key, parameter in model.named_parameters():
            mine = plan[key].layout.shard(parameter.grad, rank, size)
            torch.testing.assert_close(gradients[key], mine, rtol=1e-3, atol=1e-5)
