"""The operator that stands for an all-reduce in compiled code on CPUs: its numbers, and what Inductor makes of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import comms, config
from torch._inductor.utils import contains_collective, run_and_get_code
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardwise.collectives import copy_to_tp, reduce_from_tp
from shardwise.testing.fake import fake_rank

ONE_STEP, TWO_STEPS = "torch.ops.shardwise.all_reduce_.default", "torch.ops._c10d_functional.all_reduce_.default"


def two_sums(x: Tensor, y: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """Two all-reduces forward, of which neither needs the other, and two backward."""
    return reduce_from_tp(copy_to_tp(x, mesh).exp(), mesh), reduce_from_tp(copy_to_tp(y, mesh).exp(), mesh)


def run(mesh: DeviceMesh) -> list[str]:
    """The code that Inductor makes of `two_sums`, forward and backward."""

    def step() -> None:
        x, y = (torch.ones(4, 8, requires_grad=True) for _ in range(2))
        first, second = torch.compile(two_sums, fullgraph=True)(x, y, mesh)
        (first.sum() + second.sum()).backward()

    torch._dynamo.reset()
    with config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        return run_and_get_code(step)[1]


@pytest.fixture
def mesh():
    """The axis of two ranks of which this process is the first, alone."""
    with fake_rank(2):
        yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))


pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler warns of itself


def calls(codes: list[str], operator: str) -> list[int]:
    """How often each piece of code calls an operator."""
    return [code.count(f"{operator}(") for code in codes]


def test_inductor_keeps_the_order_of_independent_sums(mesh):
    """Guards: all-reduces that Inductor may move past each other, on one rank this way and on another, whose shards have
    other sizes, that way: each rank would then add up different tensors, silently.
    """
    seen: list[int] = []
    ordering = comms.decide_global_ordering_of_comms

    def spy(nodes: list[object], *args: object) -> list[object]:
        seen.append(sum(contains_collective(node) for node in nodes))
        return ordering(nodes, *args)

    with patch.object(comms, "decide_global_ordering_of_comms", spy):
        codes = run(mesh)
    assert calls(codes, ONE_STEP) == [2, 2]
    assert seen == [2, 2]


@pytest.mark.parametrize("reorder", [False, True])
def test_a_start_and_a_wait_where_inductor_may_overlap(mesh, reorder):
    """Guards: collectives that finish at once although Inductor was told to compute something in the meantime; and two calls
    for each where it was not.
    """
    patched: AbstractContextManager[None] = config.patch(reorder_for_compute_comm_overlap=reorder)
    with patched:
        codes = run(mesh)
    assert calls(codes, TWO_STEPS if reorder else ONE_STEP) == [2, 2]
    assert calls(codes, ONE_STEP if reorder else TWO_STEPS) == [0, 0]


def _sums(mesh: DeviceMesh, rank: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.full((4, 8), 0.5 + rank, requires_grad=True)

    def twice_read(x: Tensor) -> tuple[Tensor, Tensor]:
        part = x * 2
        return reduce_from_tp(part.clone(), mesh), part

    torch._dynamo.reset()
    total, part = torch.compile(twice_read, fullgraph=True, backend=backend)(x)
    (total.sum() + part.sum()).backward()
    assert x.grad is not None
    return total.detach(), part.detach(), x.grad


def on_a_rank(backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """On a rank: a sum, the part of it that this rank had, and the part's gradient."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    return _sums(mesh, mesh.get_local_rank(), backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_input_is_left_as_it_was(pool2, backend):
    """Guards: a sum written over a tensor that is read later."""
    for rank, (total, part, gradient) in enumerate(pool2.run(on_a_rank, backend, timeout=240.0)):
        assert torch.equal(total, torch.full((4, 8), 2 * (0.5 + 1.5)))
        assert torch.equal(part, torch.full((4, 8), 2 * (0.5 + rank)))
        assert torch.equal(gradient, torch.full((4, 8), 4.0))
