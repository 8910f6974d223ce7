"""Reading a box of an expression without reading the rest.

`fill(out, expression, box)` pushes the box down through the operations that only move or cast values, so that a source is asked
for exactly the range that is needed, and copies it straight into its place in `out`:

    cat([stack([w1.0, w1.1]), stack([w3.0, w3.1])], 1)[1:2, 0:8]    ->   out[0, 0:8] <- w1.1[0:8]

and through those that work element by element (a quantized weight times its scales), in steps of a few MiB. Every other
operation reads its inputs whole, runs for real, and the box is taken of its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from shardwise.lazy.expr import Const, Expr, Leaf, Op, full_box, lengths, take
from shardwise.lazy.views import Box, Cover, cover

_STEP = 1 << 20  # elements that are computed at once


def whole(expr: Expr) -> Tensor:
    """All values of `expr`. May share memory with a source or a constant: the caller doesn't write to it."""
    return part(expr, full_box(expr.shape))


def part(expr: Expr, box: Box) -> Tensor:
    """The values of `expr` in `box`. May share memory, as `whole`."""
    if isinstance(expr, Leaf):
        return expr.source.read(box)
    if isinstance(expr, Const):
        return take(expr.tensor, box)
    return fresh(expr, box)


def fresh(expr: Expr, box: Box) -> Tensor:
    """The values of `expr` in `box`: a new contiguous CPU tensor of its dtype."""
    out = torch.empty(lengths(box), dtype=expr.dtype, device="cpu")
    fill(out, expr, box)
    return out


def fill(out: Tensor, expr: Expr, box: Box) -> None:
    """Write the values of `expr` in `box` into `out`, of the box's shape and any strides, dtype and device."""
    if isinstance(expr, Leaf):
        out.copy_(expr.source.read(box))
    elif isinstance(expr, Const):
        out.copy_(take(expr.tensor, box))
    elif isinstance(expr, Op) and 0 not in out.shape:
        rule = _RULES.get(str(expr.func.overloadpacket), _pointwise if torch.Tag.pointwise in expr.func.tags else None)
        if rule is None or not rule(out, expr, box):
            out.copy_(take(_compute(expr), box))


def _compute(op: Op) -> Tensor:
    args, kwargs = tree_map_only(Expr, whole, (op.args, dict(op.kwargs)))
    result = op.func(*args, **kwargs)
    return cast(Tensor, result if op.index is None else result[op.index])


def _fill_cast(out: Tensor, expr: Expr, box: Box, dtype: torch.dtype) -> None:
    """`fill` of `expr` cast to `dtype`. A cast to a third dtype on the way must round, so it is not skipped."""
    if dtype in (expr.dtype, out.dtype):
        fill(out, expr, box)
    else:
        between = torch.empty(lengths(box), dtype=dtype, device="cpu")
        fill(between, expr, box)
        out.copy_(between)


# Rules: (out, op, box) -> whether they applied. Each restates `out` and `box` in terms of the operation's inputs.


def _same(out: Tensor, op: Op, box: Box) -> bool:
    _fill_cast(out, op.input, box, op.dtype)
    return True


def _cat(out: Tensor, op: Op, box: Box) -> bool:
    parts = [part for part in cast(Sequence[Expr], op.args[0]) if part.shape != (0,) or op.shape == (0,)]
    dim = _dim(op, 1, default=0)
    start, stop = box[dim]
    offset = 0
    for part in parts:
        low, high = max(start, offset), min(stop, offset + part.shape[dim])
        if low < high:
            inner = (*box[:dim], (low - offset, high - offset), *box[dim + 1 :])
            _fill_cast(out.narrow(dim, low - start, high - low), part, inner, op.dtype)
        offset += part.shape[dim]
    return True


def _stack(out: Tensor, op: Op, box: Box) -> bool:
    dim = _dim(op, 1, default=0)
    parts = cast(Sequence[Expr], op.args[0])
    for position, index in enumerate(range(*box[dim])):
        _fill_cast(out.select(dim, position), parts[index], box[:dim] + box[dim + 1 :], op.dtype)
    return True


def _shifted(out: Tensor, op: Op, box: Box, dim: int, offset: int) -> bool:
    start, stop = box[dim]
    fill(out, op.input, (*box[:dim], (start + offset, stop + offset), *box[dim + 1 :]))
    return True


def _slice(out: Tensor, op: Op, box: Box) -> bool:
    dim = _dim(op, 1, default=0)
    bounds = slice(*(cast("int | None", op.argument(2 + i, name)) for i, name in enumerate(("start", "end", "step"))))
    first, _, step = bounds.indices(op.input.shape[dim])
    if step == 1:
        return _shifted(out, op, box, dim, first)
    start, stop = box[dim]
    covering = (*box[:dim], (first + start * step, first + (stop - 1) * step + 1), *box[dim + 1 :])
    out.copy_(fresh(op.input, covering)[(slice(None),) * dim + (slice(None, None, step),)])
    return True


def _split(out: Tensor, op: Op, box: Box) -> bool:
    dim, index = _dim(op, 2, default=0), cast(int, op.index)
    sizes = cast("int | Sequence[int]", op.args[1])
    return _shifted(out, op, box, dim, index * sizes if isinstance(sizes, int) else sum(sizes[:index]))


def _at(out: Tensor, op: Op, box: Box, dim: int, index: int) -> bool:
    index %= op.input.shape[dim]
    fill(out.unsqueeze(dim), op.input, (*box[:dim], (index, index + 1), *box[dim:]))
    return True


def _select(out: Tensor, op: Op, box: Box) -> bool:
    return _at(out, op, box, _dim(op, 1, ndim=len(op.input.shape)), cast(int, op.argument(2, "index")))


def _unbind(out: Tensor, op: Op, box: Box) -> bool:
    return _at(out, op, box, _dim(op, 1, default=0, ndim=len(op.input.shape)), cast(int, op.index))


def _permuted(out: Tensor, op: Op, box: Box, order: Sequence[int]) -> bool:
    back = [order.index(dim) for dim in range(len(order))]
    fill(out.permute(back), op.input, tuple(box[dim] for dim in back))
    return True


def _permute(out: Tensor, op: Op, box: Box) -> bool:
    return _permuted(out, op, box, [dim % len(box) for dim in cast(Sequence[int], op.argument(1, "dims"))])


def _transpose(out: Tensor, op: Op, box: Box) -> bool:
    order = list(range(len(box)))
    first, second = (0, 1) if op.func.overloadpacket is torch.ops.aten.t else (_dim(op, 1), _dim(op, 2))
    if len(box) > 1:
        order[first], order[second] = second, first
    return _permuted(out, op, box, order)


def _unsqueeze(out: Tensor, op: Op, box: Box) -> bool:
    dim = _dim(op, 1)
    fill(out.select(dim, 0), op.input, box[:dim] + box[dim + 1 :])
    return True


def _squeeze(out: Tensor, op: Op, box: Box) -> bool:
    shape = op.input.shape
    named = op.argument(1, "dim")
    dims = range(len(shape)) if named is None else [named] if isinstance(named, int) else cast(Sequence[int], named)
    inner = list(box)
    for dim in sorted(dim % len(shape) for dim in dims):
        if shape[dim] == 1:
            out = out.unsqueeze(dim)
            inner.insert(dim, (0, 1))
    fill(out, op.input, tuple(inner))
    return True


def _expand(out: Tensor, op: Op, box: Box) -> bool:
    shape = op.input.shape
    inner = tuple((0, 1) if length == 1 else bounds for length, bounds in zip(shape, box[len(box) - len(shape) :], strict=True))
    out.copy_(fresh(op.input, inner))
    return True


def _pointwise(out: Tensor, op: Op, box: Box) -> bool:
    for place, step in _steps(box):
        args, kwargs = tree_map_only(Expr, partial(_broadcast_part, step), (op.args, dict(op.kwargs)))
        take(out, place).copy_(op.func(*args, **kwargs))
    return True


def _broadcast_part(box: Box, expr: Expr) -> Tensor:
    """What `box` of a result needs of an input that is broadcast to it."""
    within = box[len(box) - len(expr.shape) :]
    return part(expr, tuple((0, 1) if n == 1 else bounds for n, bounds in zip(expr.shape, within, strict=True)))


def _looked_up(out: Tensor, op: Op, box: Box) -> bool:
    table, index = whole(op.input), cast(Expr, op.argument(1, "index"))
    for place, step in _steps(box):
        take(out, place).copy_(op.func(table, part(index, step)))
    return True


def _steps(box: Box) -> Iterator[tuple[Box, Box]]:
    """`box` in pieces of some rows: where each lies in what `box` takes, and itself."""
    shape = lengths(box)
    dim = next((dim for dim, length in enumerate(shape) if length > 1), 0)
    if math.prod(shape) <= _STEP or not shape:
        yield full_box(shape), box
        return
    rows = max(1, _STEP // math.prod(shape[dim + 1 :]))
    start, stop = box[dim]
    for low in range(start, stop, rows):
        high = min(low + rows, stop)
        yield (
            (*full_box(shape[:dim]), (low - start, high - start), *full_box(shape[dim + 1 :])),
            (*box[:dim], (low, high), *box[dim + 1 :]),
        )


def _view(out: Tensor, op: Op, box: Box) -> bool:
    if isinstance(dtype := op.argument(1, "dtype"), torch.dtype):
        if dtype.itemsize == op.input.dtype.itemsize:
            out.copy_(part(op.input, box).view(dtype))
        return dtype.itemsize == op.input.dtype.itemsize
    found = cover(op.input.shape, op.shape, box)
    if found is None:
        out.copy_(take(whole(op.input).reshape(op.shape), box))
    else:
        _fill_covered(out, op, found)
    return True


def _fill_covered(out: Tensor, op: Op, found: Cover) -> None:
    if found.exact:
        try:
            target = out.view(lengths(found.box))
        except RuntimeError:  # `out` is strided such that it can't be seen in the input's shape
            target = None
        if target is not None:
            return fill(target, op.input, found.box)
    out.copy_(found.extract(fresh(op.input, found.box)))
    return None


def _dim(op: Op, position: int, default: int | None = None, ndim: int | None = None) -> int:
    return cast(int, op.argument(position, "dim", default)) % (ndim or len(op.shape))


_RULES: Mapping[str, Callable[[Tensor, Op, Box], bool]] = {
    f"aten.{name}": rule
    for names, rule in {
        "detach alias clone contiguous lift_fresh _to_copy": _same,
        "cat concat": _cat,
        "stack": _stack,
        "slice": _slice,
        "split split_with_sizes": _split,
        "select": _select,
        "unbind": _unbind,
        "permute": _permute,
        "t transpose": _transpose,
        "unsqueeze": _unsqueeze,
        "squeeze": _squeeze,
        "expand": _expand,
        "view _unsafe_view reshape _reshape_alias": _view,
        "take": _looked_up,
    }.items()
    for name in names.split()
}
