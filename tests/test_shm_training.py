"""The backend "shm" under what trains models: DDP, FSDP2, compiled and functional collectives, meshes, profiles."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from shardwise.shm import ShmGroup
from shardwise.testing import RankPool

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def shm2():
    """Two ranks on a default group of shared memory."""
    with RankPool(2, backend="cpu:shm", start_method="forkserver") as pool:
        yield pool


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))


def _batch(step: int) -> Tensor:
    torch.manual_seed(dist.get_rank() + 10 * step)
    return torch.randn(8, 64)


def _ddp() -> list[Tensor]:
    model = DistributedDataParallel(_model(), bucket_cap_mb=0.05)
    for step in range(3):
        model(_batch(step)).pow(2).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def _fsdp() -> list[Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = _model()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    for step in range(2):
        model(_batch(step)).pow(2).sum().backward()
    return [parameter.grad.full_tensor() for parameter in model.parameters()]


def _compiled() -> list[Tensor]:
    @torch.compile(fullgraph=True)
    def step(x: Tensor) -> Tensor:
        y = x * 2
        dist.all_reduce(y)
        z = torch.empty(2 * y.numel())
        dist.all_gather_into_tensor(z, y)
        return z.sin() + 1

    return [step(_batch(0).flatten())]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def _checkpointed() -> list[Tensor]:
    model, x = _model(), _batch(0)
    checkpoint(lambda x: _Sum.apply(model(x)), x, use_reentrant=False).pow(2).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("train", [_ddp, _fsdp, _compiled, _checkpointed])
def test_gradients_are_those_over_gloo(shm2, pool2, train):
    """Guards: futures that complete before their tensors are reduced, parameters sharded in another order, a graph break."""
    torch.testing.assert_close(shm2.run(train), pool2.run(train))


def _meshes() -> list[object]:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    copied = copy.deepcopy(mesh)
    x = torch.ones(3)
    dist.all_reduce(x, group=copied.get_group("tp"))
    group = mesh.get_group("tp")
    return [x.sum().item(), isinstance(group, ShmGroup), dist.get_backend_config(group)]


def test_meshes_have_groups_of_shared_memory(shm2):
    """Guards: axes of a mesh that fall back to another backend, and meshes that cannot be copied."""
    assert shm2.run(_meshes) == [[6.0, True, "cpu:shm"]] * 2


def _beside() -> list[str]:
    group = dist.new_group(backend="cpu:shm,cuda:gloo")
    x = torch.ones(2)
    dist.all_reduce(x, group=group)
    backend = group._get_backend(torch.device("cuda"))
    return [str(group._device_types), type(backend).__name__, str(x.tolist())]


def test_another_device_keeps_the_backend_that_was_asked_for(shm2):
    """Guards: c10d takes a group that is written in Python for all devices, and drops the backends of the others."""
    types = str([torch.device("cpu"), torch.device("cuda")])
    assert shm2.run(_beside) == [[types, "ProcessGroupGloo", "[2.0, 2.0]"]] * 2


def _traced() -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        dist.all_reduce(torch.ones(3))
        dist.all_gather_into_tensor(torch.empty(6), torch.ones(3))
    keys = [event.key for event in trace.key_averages()]
    return sorted(key for key in keys if key.startswith(("c10d::", "shm:")))


def test_a_profile_shows_the_collectives(shm2):
    """Guards: collectives that tools which count c10d's operators no longer find."""
    expected = ["c10d::_allgather_base_", "c10d::allreduce_", "shm:all_gather", "shm:all_reduce"]
    assert shm2.run(_traced) == [expected] * 2
