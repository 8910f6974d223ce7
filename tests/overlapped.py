"""What the tests of `overlap=True` share: the same use of a module, without overlap and with it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import shardwise
from blocks import tp_axis
from shardwise.layers.overlap import OverlappedLinear

MLP_PLAN = {"up": "colwise", "down": "rowwise"}
GATED_PLAN = {"gate_up": "packed_colwise", "down": "rowwise"}
Use = Callable[[nn.Module], object]


def both_ways(module: nn.Module, plan: dict[str, str], use: Use, mesh: DeviceMesh | None = None) -> tuple[object, object]:
    """On a rank: what `use` gives for `module` under `plan`, without overlap and with it."""
    found = []
    for asked in (False, True):
        model = shardwise.parallelize(copy.deepcopy(module), mesh or tp_axis(), plan=plan, overlap=asked)
        assert any(isinstance(part, OverlappedLinear) for part in model.modules()) == asked
        torch.manual_seed(5)
        found.append(use(model))
    return found[0], found[1]


def same(threads: Callable[..., list], size: int, module: nn.Module, plan: dict[str, str], use: Use) -> None:
    """What `use` gives is the same, bit for bit, with overlap and without, on every rank."""
    for plain, overlapped in threads(both_ways, size, module, plan, use):
        equal(plain, overlapped)


def equal(a: object, b: object) -> None:
    """Bit for bit, None where the other is None."""
    torch.testing.assert_close(b, a, rtol=0, atol=0, allow_subclasses=False)


def given(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """What backward left: the gradients of parameters and inputs, without those that are None."""
    grads = {name: p.grad for name, p in model.named_parameters()} | {f"input {i}": t.grad for i, t in enumerate(inputs)}
    found = {name: grad for name, grad in grads.items() if grad is not None}
    assert all(found[name].dtype == p.dtype for name, p in model.named_parameters() if name in found)
    return found


def train(model: nn.Module, *data: Tensor, call: Use | None = None) -> dict[str, Tensor]:
    """The gradients of accumulated micro-batches."""
    leaves = [t.clone().requires_grad_() for t in data]
    for leaf in leaves:
        output = model(leaf * 1) if call is None else call(leaf * 1)
        (output.sin() * output).sum().backward()
    return given(model, *leaves)
