"""The collectives on GPUs: nccl where each rank can have a GPU (one rank always can), gloo where two share one.

What a collective gives on CPU tensors is tested in `test_collectives`; here the device has to give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.testing import assert_close

from gpus import DEVICE, REHEARSED, axis, captures, compiles, needs_cuda, pool
from gpus import one as one
from gpus import ranks as ranks
from shardwise.collectives import (
    all_to_all,
    copy_to_tp,
    gather_from_sp,
    gather_from_tp,
    reduce_from_tp,
    reduce_scatter_to_sp,
    scatter_to_tp,
)
from shardwise.mesh import device_type, local_device, tp_mesh
from shardwise.testing import RankPool

pytestmark = pytest.mark.gpu

Call = Callable[[Tensor, DeviceMesh], Tensor]
SHAPE = (4, 6, 8)


def uneven(mesh: DeviceMesh, length: int) -> tuple[int, ...]:
    """Lengths that are not alike, where there are several."""
    return (length - mesh.size() + 1, *(1,) * (mesh.size() - 1))


CALLS: dict[str, Call] = {
    "copy_to_tp": copy_to_tp,
    "reduce_from_tp": reduce_from_tp,
    "scatter_to_tp": lambda x, mesh: scatter_to_tp(x, mesh, -1, uneven(mesh, 8)),
    "gather_from_tp": gather_from_tp,
    "gather_from_tp, rows": lambda x, mesh: gather_from_tp(x, mesh, 0),
    "gather_from_sp": gather_from_sp,
    "reduce_scatter_to_sp": lambda x, mesh: reduce_scatter_to_sp(x, mesh, 1, uneven(mesh, 6)),
    "all_to_all": lambda x, mesh: all_to_all(x, mesh, (4 // mesh.size(),) * mesh.size(), (4 // mesh.size(),) * mesh.size()),
}


def chain(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Every collective once, none of whose sums the next one undoes.  (4, 6, 8) -> the same."""
    x = reduce_from_tp(copy_to_tp(x, mesh) * 2, mesh)
    x = gather_from_tp(scatter_to_tp(x, mesh).sin(), mesh)
    x = reduce_scatter_to_sp(gather_from_sp(scatter_to_tp(x, mesh, 1), mesh) * 3, mesh)
    x = gather_from_tp(x.cos(), mesh, 1)
    rows = (4 // mesh.size(),) * mesh.size()
    return all_to_all(x, mesh, rows, rows)


@pytest.fixture(scope="module")
def unstarted() -> Iterator[RankPool]:
    """Two processes without a process group."""
    with pool(2, backend=None) as started:
        yield started


@pytest.fixture(params=["one", "ranks"])
def some(request: pytest.FixtureRequest) -> RankPool:
    """One rank, and two."""
    return request.getfixturevalue(request.param)


def forward_and_backward(call: Call, x: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """The output, and the gradient that comes back when every element of it counts differently."""
    x = x.to(mesh.device_type).requires_grad_()
    output = call(x * 1, mesh)
    weight = torch.linspace(-1, 2, output.numel()).sin().view(output.shape).to(output)
    (output * weight).sum().backward()
    assert x.grad is not None
    return output.detach(), x.grad


def beside_the_cpu(name: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Forward, backward, and forward without a graph, each on this rank's device and on the CPU."""
    x, call = torch.randn(SHAPE, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype), CALLS[name]
    device, cpu = (forward_and_backward(call, x, axis(kind)) for kind in (DEVICE, "cpu"))
    plain = [call(x.to(kind, copy=True), axis(kind)) for kind in (DEVICE, "cpu")]
    return [(a.cpu(), b) for a, b in (*zip(device, cpu, strict=True), plain)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_the_device_gives_what_the_cpu_gives(name, dtype, some):
    """Guards: a collective that the backend of the device does not have, or has with another meaning (sizes, strides). The
    sum of two numbers has no order, so every bit is the same.
    """
    for pairs in some.run(beside_the_cpu, name, dtype):
        for device, cpu in pairs:
            assert torch.equal(device, cpu)


def compiled() -> list[tuple[Tensor, Tensor]]:
    """`chain` in eager mode and compiled."""
    x, mesh = torch.randn(SHAPE, generator=torch.Generator().manual_seed(dist.get_rank())), axis()
    eager = forward_and_backward(chain, x, mesh)
    return list(zip(eager, forward_and_backward(torch.compile(chain, fullgraph=True), x, mesh), strict=True))


@pytest.mark.parametrize("some", ["one", pytest.param("ranks", marks=compiles)], indirect=True)
def test_compiled_collectives(some):
    """Guards: a graph break, or a collective that inductor drops or does in place where its input is still needed."""
    for pairs in some.run(compiled):
        for eager, made in pairs:
            assert_close(made, eager, atol=1e-6, rtol=1e-5)


def captured() -> list[tuple[Tensor, Tensor]] | None:
    """`chain` in eager mode, and captured in a CUDA graph that is then replayed with the same values."""
    if not captures():
        return None
    mesh = axis()
    x = torch.zeros(SHAPE, device=DEVICE, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(chain(x, mesh).sum(), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = chain(x, mesh)
        (gradient,) = torch.autograd.grad(output.sum(), x)
    values = torch.randn(SHAPE, device=DEVICE)
    with torch.no_grad():
        x.copy_(values)
    graph.replay()
    leaf = values.clone().requires_grad_()
    expected = chain(leaf, mesh)
    expected.sum().backward()
    assert leaf.grad is not None
    return [(output.detach(), expected.detach()), (gradient, leaf.grad)]


@needs_cuda
def test_collectives_in_a_cuda_graph(some):
    """Guards: a collective that waits for the host, which no graph can hold."""
    for pairs in some.run(captured):
        if pairs is None:
            pytest.skip("two ranks share a GPU, so gloo carries them")
        for replayed, eager in pairs:
            assert torch.equal(replayed, eager)


def started() -> tuple[str, str, Tensor]:
    """What `tp_mesh` starts by itself, where the rank computes, and a sum there."""
    mesh = tp_mesh()
    try:
        total = torch.ones(2, device=local_device(mesh))
        dist.all_reduce(total, group=mesh.get_group())
        return dist.get_backend_config(mesh.get_group()), mesh.device_type, total
    finally:
        dist.destroy_process_group()


def test_the_process_group_is_one_that_works_here(unstarted):
    """Guards: nccl for two ranks on one GPU, which it refuses at the first collective; gloo where each has its own."""
    alone = not REHEARSED and torch.cuda.device_count() > 1
    for backend, kind, total in unstarted.run(started):
        assert kind == DEVICE == device_type() or REHEARSED
        assert total.tolist() == [2.0, 2.0]
        assert ("nccl" in backend) == alone
