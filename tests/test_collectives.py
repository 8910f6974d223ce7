"""The collectives against their types: what a value and its gradient are on each rank, written down densely, without ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing import assert_close

from shardwise import collectives
from shardwise.collectives import copy_to_tp, even_sizes, gather_from_tp, reduce_from_tp, scatter_to_tp
from shardwise.testing import RankError

# function: (type of its input, type of its output, its dual)
TYPES = {
    "copy_to_tp": ("I", "R", "reduce_from_tp"),
    "reduce_from_tp": ("P", "I", "copy_to_tp"),
    "scatter_to_tp": ("I", "S", "gather_from_tp"),
    "gather_from_tp": ("S", "I", "scatter_to_tp"),
    "gather_from_sp": ("S", "R", "reduce_scatter_to_sp"),
    "reduce_scatter_to_sp": ("P", "S", "gather_from_sp"),
}
ALIKE_VALUE, ALIKE_GRADIENT = ("R", "I"), ("I", "P")
CUT = [name for name, (source, target, _) in TYPES.items() if "S" in source + target]


def tp_axis() -> DeviceMesh:
    """All ranks as the tp axis."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def random_values(kind: str, shape: tuple[int, ...], dim: int, sizes: tuple[int, ...], alike: tuple[str, ...]) -> list[Tensor]:
    """One tensor a rank, as `kind` has it: slices for S, the same for the types in `alike`, else different ones. float64."""
    if kind == "S":
        return list(torch.randn(shape, dtype=torch.float64).split(sizes, dim))
    values = [torch.randn(shape, dtype=torch.float64) for _ in sizes]
    return [values[0].clone() for _ in sizes] if kind in alike else values


def dense(name: str, values: list[Tensor], dim: int, sizes: tuple[int, ...]) -> list[Tensor]:
    """What each rank must get, computed from all ranks' inputs."""
    total = sum(values) if name in ("reduce_from_tp", "reduce_scatter_to_sp") else None
    if name == "copy_to_tp":
        return values
    if name == "reduce_from_tp":
        return [total for _ in sizes]
    if name.startswith("gather"):
        return [torch.cat(values, dim) for _ in sizes]
    return [(value if total is None else total).split(sizes, dim)[rank] for rank, value in enumerate(values)]


def pairing(kind: str, values: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """<value, gradient> over the axis: what is the same on every rank in both counts once."""
    products = [(value * gradient).sum() for value, gradient in zip(values, gradients, strict=True)]
    return products[0] if kind == "I" else torch.stack(products).sum()


def call(name: str, x: Tensor, mesh: DeviceMesh, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """The function called `name`, with the arguments that it takes."""
    function = getattr(collectives, name)
    return function(x, mesh, dim, sizes) if name in CUT else function(x, mesh)


def forward_backward(name: str, xs: list[Tensor], gradients: list[Tensor], seconds: list[Tensor], dim: int, sizes) -> tuple:
    """On one rank: output, the input's gradient, and the gradient of that gradient."""
    mesh, rank = tp_axis(), dist.get_rank()
    leaf = xs[rank].clone().requires_grad_()
    y = call(name, leaf * 1, mesh, dim, sizes)
    gradient = gradients[rank].clone().requires_grad_()
    (x_gradient,) = torch.autograd.grad(y, leaf, gradient, create_graph=True)
    (second,) = torch.autograd.grad(x_gradient, gradient, seconds[rank])
    return y.detach(), x_gradient.detach(), second


def check(name: str, shape: tuple[int, ...], dim: int, sizes: tuple[int, ...], threads) -> None:
    """Forward, backward and double backward of one function against `dense`, and the adjoint identity between the types."""
    source, target, dual = TYPES[name]
    xs = random_values(source, shape, dim, sizes, ALIKE_VALUE)
    gradients = random_values(target, shape, dim, sizes, ALIKE_GRADIENT)
    seconds = random_values(source, shape, dim, sizes, ALIKE_VALUE)
    results = threads(forward_backward, len(sizes), name, xs, gradients, seconds, dim, sizes)
    ys, x_gradients, second = (list(part) for part in zip(*results, strict=True))
    for rank in range(len(sizes)):
        assert_close(ys[rank], dense(name, xs, dim, sizes)[rank])
        assert_close(x_gradients[rank], dense(dual, gradients, dim, sizes)[rank])
        assert_close(second[rank], dense(name, seconds, dim, sizes)[rank])
    assert_close(pairing(target, ys, gradients), pairing(source, xs, x_gradients))
    for kind, values, alike in ((target, ys, ALIKE_VALUE), (source, x_gradients, ALIKE_GRADIENT)):
        assert kind not in alike or all(torch.equal(values[0], value) for value in values)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", TYPES)
def test_values_gradients_and_types(name, size, threads):
    """Guards: a backward that is not the adjoint (a sum too many or too few), a gradient that differs between ranks where it
    must agree, a wrong double backward. An all-reduce too many gives `size` times the value; the tolerance is float64 noise.
    """
    check(name, (4, 5, 6), -1, even_sizes(6, size), threads)
    right = [torch.ones(2, dtype=torch.float64)] * size  # the check bites: torch's functional all-reduce, backward of P -> I
    with pytest.raises(AssertionError):
        assert_close(pairing("I", right, right), pairing("P", right, [size * gradient for gradient in right]))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("name", CUT)
def test_uneven_sizes_along_every_dim(name, dim, threads):
    """Guards: a slice at the wrong place, or padding left in, where the ranks' lengths differ; also a rank with nothing."""
    shape = (5, 7, 8)
    check(name, shape, dim, even_sizes(shape[dim], 3), threads)
    check(name, shape, dim, (1, 0, shape[dim] - 1), threads)


@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6), (0,)])
@pytest.mark.parametrize("name", TYPES)
def test_no_rows(name, shape, threads):
    """Guards: a crash, or a rank that skips the call, where there is nothing to send (an expert without tokens)."""
    check(name, shape, -1, even_sizes(shape[-1], 2), threads)


def _non_contiguous(name: str, xs: list[Tensor], dim: int, sizes: tuple[int, ...]) -> list[Tensor]:
    mesh, x = tp_axis(), xs[dist.get_rank()]
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    found = [call(name, strided.clone(memory_format=torch.preserve_format), mesh, dim, sizes)]
    leaf = strided.detach().requires_grad_()
    y = call(name, leaf * 1, mesh, dim, sizes)
    y.mT.contiguous().mT.backward(torch.ones_like(y).mT.contiguous().mT)
    return [*found, y.detach(), leaf.grad]


@pytest.mark.parametrize("name", TYPES)
def test_non_contiguous_tensors(name, threads):
    """Guards: a reduction dropped (its result written to a copy that nobody sees) for a tensor that is not contiguous, in
    forward or backward. The bug would leave a sum of two at half its value.
    """
    sizes = (3, 3)
    xs = random_values(TYPES[name][0], (4, 5, 6), -1, sizes, ALIKE_VALUE)
    ones = [torch.ones_like(x) for x in dense(name, xs, -1, sizes)]
    for rank, (plain, y, gradient) in enumerate(threads(_non_contiguous, 2, name, xs, -1, sizes)):
        assert_close(plain, dense(name, xs, -1, sizes)[rank])
        assert_close(y, dense(name, xs, -1, sizes)[rank])
        assert_close(gradient, dense(TYPES[name][2], ones, -1, sizes)[rank])


def _all_to_all(counts: list[list[int]], xs: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor, ...]:
    rank, mesh = dist.get_rank(), tp_axis()
    send, receive = tuple(counts[rank]), tuple(row[rank] for row in counts)
    leaf = xs[rank].clone().requires_grad_()
    y = collectives.all_to_all(leaf, mesh, receive=receive, send=send)
    gradient = gradients[rank].clone().requires_grad_()
    (x_gradient,) = torch.autograd.grad(y, leaf, gradient, create_graph=True)
    (second,) = torch.autograd.grad(x_gradient, gradient, xs[rank])
    with torch.no_grad():
        assert torch.equal(collectives.all_to_all(leaf, mesh, receive=receive, send=send), y)
    return y.detach(), x_gradient.detach(), second


@pytest.mark.parametrize("counts", [[[1, 2, 0], [3, 0, 1], [0, 0, 0]], [[2, 2, 2]] * 3, [[0, 4], [0, 3]], [[0, 0], [0, 0]]])
def test_all_to_all(counts, threads):
    """Guards: rows that come back to another rank or in another order in backward, with ranks that send or receive nothing."""
    size = len(counts)
    xs = [torch.randn(sum(row), 3, dtype=torch.float64) for row in counts]
    parts = [x.split(row) for x, row in zip(xs, counts, strict=True)]
    expected = [torch.cat([parts[source][rank] for source in range(size)]) for rank in range(size)]
    gradients = [torch.randn_like(x) for x in expected]
    homeward = [g.split([row[rank] for row in counts]) for rank, g in enumerate(gradients)]
    for rank, (y, gradient, second) in enumerate(threads(_all_to_all, size, counts, xs, gradients)):
        assert torch.equal(y, expected[rank])
        assert torch.equal(gradient, torch.cat([homeward[target][rank] for target in range(size)]))
        assert torch.equal(second, expected[rank])


def _nodes() -> dict[str, tuple[bool, bool, bool]]:
    mesh, sizes = tp_axis(), (2, 2)
    found = {}
    for name, (source, _, _) in TYPES.items():
        x = torch.ones(2 if source == "S" else 4)
        plain = call(name, x.clone(), mesh, 0, sizes)
        with torch.no_grad():
            frozen = call(name, x.clone().requires_grad_(), mesh, 0, sizes)
        trained = call(name, x.clone().requires_grad_() * 1, mesh, 0, sizes)
        found[name] = (plain.grad_fn is None, frozen.grad_fn is None, trained.grad_fn is not None)
    same = torch.ones(4)
    found["same object"] = (copy_to_tp(same, mesh) is same,) * 3
    return found


def test_no_node_where_no_gradient_can_flow(threads):
    """Guards: the cost of an autograd node (and of its all-reduce) in inference and for frozen inputs."""
    for found in threads(_nodes, 2):
        assert found == dict.fromkeys([*TYPES, "same object"], (True, True, True))


class UnmarkedReduce(torch.autograd.Function):
    """The defect: the sum is written in place, and autograd is not told."""

    @staticmethod
    def forward(ctx, x, mesh):
        dist.all_reduce(x.data, group=mesh.get_group())
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _exp_then_sum(marked: bool) -> Tensor:
    mesh = tp_axis()
    w = torch.full((1,), 0.5, requires_grad=True)
    y = w.exp()
    total = reduce_from_tp(y, mesh) if marked else UnmarkedReduce.apply(y, mesh)
    total.sum().backward()
    return w.grad


def test_in_place_sum_after_an_op_that_saved_its_output(threads):
    """Guards: a silently wrong gradient, as an unmarked in-place sum gives it after `exp`: 3.30 for 1.65."""
    right = torch.full((1,), 0.5).exp()
    for gradient in threads(_exp_then_sum, 2, False):  # the defect, put back
        assert_close(gradient, 2 * right)
    with pytest.raises(RankError, match="modified by an inplace operation"):
        threads(_exp_then_sum, 2, True)


def _owned_by_others(training: bool) -> list[Tensor]:
    """Sums into a view, a leaf and a strided tensor: results, gradients, and what is left in the originals."""
    mesh = tp_axis()
    base, leaf = torch.ones(4, 3, requires_grad=training), torch.ones(3, requires_grad=True)
    strided = torch.ones(3, 4, requires_grad=training)
    with torch.set_grad_enabled(training):
        whole = base * 1
        view_sum, leaf_sum = reduce_from_tp(whole[1:3], mesh), reduce_from_tp(leaf, mesh)
        strided_sum = reduce_from_tp((strided * 1).t(), mesh)
        if training:
            (view_sum.sum() + leaf_sum.sum() + strided_sum.sum() + whole.sum()).backward()
    gradients = [base.grad, leaf.grad, strided.grad] if training else []
    return [view_sum, leaf_sum, strided_sum, whole, leaf, *gradients]


@pytest.mark.parametrize("training", [True, False])
def test_sum_leaves_alone_what_it_does_not_own(training, threads):
    """Guards: a view's base, or a parameter, overwritten by the sum; a sum that is lost because it was written to a copy."""
    for rank in threads(_owned_by_others, 2, training):
        view_sum, leaf_sum, strided_sum, whole, leaf, *gradients = (tensor.detach() for tensor in rank)
        assert (view_sum == 2).all()
        assert (leaf_sum == 2).all()
        assert (strided_sum == 2).all()
        assert (whole == 1).all()
        assert (leaf == 1).all()
        if training:
            base, own, strided = gradients
            assert base[:, 0].tolist() == [1, 2, 2, 1]
            assert (own == 1).all()
            assert (strided == 1).all()


def _sums_in_place() -> list[bool]:
    mesh, linear = tp_axis(), torch.nn.Linear(4, 4, bias=False)
    found = []
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            partial = linear(torch.ones(2, 3, 4))
            where = partial.data_ptr()
            found.append(reduce_from_tp(partial, mesh).data_ptr() == where)
    return found


def test_sum_of_a_product_takes_no_memory(threads):
    """Guards: a copy of every activation behind a row-wise layer."""
    assert threads(_sums_in_place, 2) == [[True, True]] * 2


def _written(name: str, xs: list[Tensor], gradients: list[Tensor], dim: int, sizes: tuple[int, ...]) -> Tensor:
    leaf = xs[dist.get_rank()].clone().requires_grad_()
    y = call(name, leaf * 1, tp_axis(), dim, sizes)
    y.mul_(2)
    y.view(-1)[:1].mul_(1)
    y.backward(gradients[dist.get_rank()])
    return leaf.grad


@pytest.mark.parametrize("shape", [(4, 1, 6), (1, 1, 6), (1, 6), (6,), (0, 6)])
@pytest.mark.parametrize("sizes", [(3, 3), (4, 2)])
@pytest.mark.parametrize("name", [name for name in TYPES if name != "copy_to_tp"])
def test_results_may_be_written_to(name, sizes, shape, threads):
    """Guards: a result that is a view made in a Function, which autograd lets nobody write to; with one row it easily is one,
    as nothing has to be copied to have the parts in order. (`copy_to_tp` gives its input as it is: writing to it raises.)
    """
    source, target, dual = TYPES[name]
    xs = random_values(source, shape, -1, sizes, ALIKE_VALUE)
    gradients = random_values(target, shape, -1, sizes, ALIKE_GRADIENT)
    expected = dense(dual, gradients, -1, sizes)
    for rank, gradient in enumerate(threads(_written, 2, name, xs, gradients, -1, sizes)):
        assert_close(gradient, 2 * expected[rank])


def _shared_gradient() -> tuple[Tensor, Tensor]:
    mesh, rank = tp_axis(), dist.get_rank()
    x, other = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    ((copy_to_tp(x, mesh) + other) * (rank + 1)).sum().backward()
    return x.grad, other.grad


def test_backward_sum_stays_out_of_a_siblings_gradient(threads):
    """Guards: an all-reduce into the gradient object that autograd hands to both operands of an addition."""
    for rank, (summed, own) in enumerate(threads(_shared_gradient, 2)):
        assert summed.tolist() == [3, 3]
        assert own.tolist() == [rank + 1] * 2


def _compiled(inputs: dict[str, list[Tensor]], weight: Tensor) -> list[list[Tensor]]:
    mesh, rank = tp_axis(), dist.get_rank()
    rows = ((1, 3), (1, 5)) if rank == 0 else ((5, 3), (3, 3))

    def step(xs: list[Tensor]) -> list[Tensor]:  # all in one graph: compiling takes longer than the rest of this file
        moved = collectives.all_to_all(xs[-1] * 2, mesh, receive=rows[0], send=rows[1])
        return [*(call(name, x * 2, mesh, -1, (4, 2)) * 3 for name, x in zip(TYPES, xs, strict=False)), moved]

    torch.compiler.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        xs = [values[rank].clone().requires_grad_() for values in inputs.values()]
        ys = function(xs)
        sum((y * weight[: y.shape[0], : y.shape[1]]).sum() for y in ys).backward()
        results.append([*(y.detach() for y in ys), *(x.grad for x in xs)])
    return results


def test_compiled_without_a_graph_break(pool2):
    """Guards: a collective that breaks the graph, is dropped by functionalisation, or gets another backward when compiled."""
    inputs = {name: random_values(source, (8, 6), -1, (4, 2), ALIKE_VALUE) for name, (source, _, _) in TYPES.items()}
    inputs["all_to_all"] = [torch.randn(6, 6, dtype=torch.float64)] * 2
    for eager, compiled in pool2.run(_compiled, inputs, torch.randn(8, 6, dtype=torch.float64)):
        assert len(eager) == 2 * len(inputs)
        assert all(map(torch.equal, eager, compiled))


def test_even_sizes():
    """Guards: a rank too long or too short where the size does not divide."""
    assert [even_sizes(7, 3), even_sizes(2, 4), even_sizes(6, 2), even_sizes(0, 2)] == [(3, 2, 2), (1, 1, 0, 0), (3, 3), (0, 0)]


def _default_sizes() -> list[list[int]]:
    mesh = tp_axis()
    x = torch.zeros(2, 6)
    local = scatter_to_tp(x, mesh)
    shapes = [
        local,
        gather_from_tp(local, mesh),
        collectives.reduce_scatter_to_sp(x, mesh),
        collectives.gather_from_sp(x, mesh),
    ]
    return [list(tensor.shape) for tensor in shapes]


def test_default_sizes_and_dims(threads):
    """Guards: defaults that differ between a function and its dual."""
    assert threads(_default_sizes, 2) == [[[2, 3], [2, 6], [2, 3], [2, 12]]] * 2
