"""`LazyTensor`: records what is done to it, or does it at once where it can't wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_iter, tree_map_only

from shardwise.lazy import ops
from shardwise.lazy.expr import Const, Expr, Op, Source, const, full_box, leaf, leaves, lengths, same, take
from shardwise.lazy.kinds import depends_on_values, device_type, makes_new_values, misfit
from shardwise.lazy.storage import Storage
from shardwise.lazy.views import Box

T = TypeVar("T")
_ATEN = torch.ops.aten


class LazyTensor(Tensor):
    """A tensor on the CPU whose values are read when they are needed. Made by `lazy`, and by operations on lazy tensors.

    `nn.Parameter(lazy_tensor)` and `copy.deepcopy(lazy_tensor)` are lazy too, and share the sources.
    """

    _expr: Expr
    _storage: Storage

    # without this, torch would turn the plain results of operations into LazyTensors that have no expression
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[LazyTensor], expr: Expr, storage: Storage | None = None) -> LazyTensor:
        device = torch.device("cpu")
        tensor = torch.Tensor._make_wrapper_subclass(cls, expr.shape, strides=expr.stride, dtype=expr.dtype, device=device)
        assert isinstance(tensor, LazyTensor)
        tensor._expr = expr
        tensor._storage = Storage(expr) if storage is None else storage
        return tensor

    def __init__(self, expr: Expr, storage: Storage | None = None) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func.overloadpacket in (_ATEN.detach, _ATEN.alias):
            return _shared(cast(LazyTensor, args[0]))
        if func._schema.is_mutable:
            return _write(func, args, kwargs)
        if func is _ATEN.equal.default and _is_one(*args):
            return True
        if makes_new_values(func):
            return func(*_metas(args), **{**_metas(kwargs), "device": kwargs.get("device") or torch.device("cpu")})
        if device_type(kwargs) == "meta":
            return func(*_metas(args), **_metas(kwargs))
        return _run(func, args, kwargs) if _must_run(func, args, kwargs) else _record(func, args, kwargs)

    @property
    def data(self) -> Tensor:
        """The same values, outside of autograd. Assigning makes this tensor share the values of another, lazy or not."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, LazyTensor):
            expr = Const(tuple(value.shape), value.stride(), value.dtype, value)
            value = LazyTensor(expr, Storage(expr, value))
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self._expr, self._storage = value._expr, value._storage

    def __deepcopy__(self, memo: dict[int, object]) -> LazyTensor:
        if id(self) in memo:
            return cast(LazyTensor, memo[id(self)])
        storage = cast(Storage, memo.setdefault(id(self._storage), self._storage.copy()))
        copy = LazyTensor(self._expr, storage).requires_grad_(self.requires_grad)
        copy.__dict__.update({name: value for name, value in self.__dict__.items() if name not in ("_expr", "_storage")})
        memo[id(self)] = copy
        return cast(LazyTensor, copy)

    def __repr__(self) -> str:  # type: ignore[override]
        names = [source.name for source in sources(self)]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"LazyTensor({list(self.shape)}, {self.dtype}, from {names[0] if names else 'memory'}{more})"


def lazy(source: Source) -> LazyTensor:
    """A tensor of the shape and dtype of `source`. Reads nothing."""
    return LazyTensor(leaf(source))


def read(tensor: Tensor, box: Box) -> Tensor:
    """The values of `tensor` in `box`, one half-open range a dim: shape `stop - start` in each dim, dtype of `tensor`.

    Of a lazy tensor, no more of the sources is read than the box needs (for operations that move or cast values; others read
    their inputs whole). It may share memory with a source, as with a plain tensor: the caller doesn't write to it.

    Raises:
        ValueError: the box doesn't lie within the tensor.
    """
    _check_box(tensor, box)
    real = _real(tensor)
    if real is not None:
        return take(real, box) if real is tensor else take(real, box).clone()
    return ops.part(cast(LazyTensor, tensor)._expr, box)


@torch.no_grad()
def read_into(out: Tensor, tensor: Tensor, box: Box) -> None:
    """Copy the values of `tensor` in `box` into `out`: shape of the box, any strides, dtype (values are cast) and device.

    Each part of a concatenated or stacked tensor goes straight from its source to its place in `out`.

    Raises:
        ValueError: the box doesn't lie within the tensor, or `out` has another shape.
    """
    _check_box(tensor, box)
    if tuple(out.shape) != lengths(box):
        raise ValueError(f"a box of shape {lengths(box)} does not go into a tensor of shape {tuple(out.shape)}")
    real = _real(tensor)
    if real is not None:
        out.copy_(take(real, box))
    else:
        ops.fill(out, cast(LazyTensor, tensor)._expr, box)


def sources(tensor: Tensor) -> tuple[Source, ...]:
    """The sources that a lazy tensor is made of, each once, in the order of use; none for a plain tensor."""
    if not isinstance(tensor, LazyTensor):
        return ()
    return tuple({id(source): source for source in leaves(tensor._expr)}.values())


def _check_box(tensor: Tensor, box: Box) -> None:
    shape = tuple(tensor.shape)
    if len(box) != len(shape) or not all(0 <= low <= high <= n for (low, high), n in zip(box, shape, strict=True)):
        raise ValueError(f"box {box} does not lie within a tensor of shape {shape}")


def _real(tensor: Tensor) -> Tensor | None:
    """The tensor in memory; None for a lazy tensor that nobody has written to."""
    if not isinstance(tensor, LazyTensor):
        return tensor
    storage = tensor._storage
    return None if storage.real is None else _replay(tensor._expr, storage.expr, storage.real)


def _replay(view: Expr, base: Expr, real: Tensor) -> Tensor:
    """The view of `real` that `view` is of `base`."""
    if view is base:
        return real
    op = cast(Op, view)
    result = op.func(_replay(op.input, base, real), *op.args[1:], **op.kwargs)
    return cast(Tensor, result if op.index is None else result[op.index])


def _shared(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor._expr, tensor._storage)


def _is_one(first: object, second: object) -> bool:
    """Whether two tensors are one of the checkpoint, as tied weights are in a `.bin` file; equal, then, whatever it holds."""
    if not isinstance(first, LazyTensor) or not isinstance(second, LazyTensor):
        return False
    return _real(first) is None and _real(second) is None and same(first._expr, second._expr)


def _must_run(func: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    """Whether the operation can't wait, or needn't because all its inputs are in memory."""
    return (
        depends_on_values(func)
        or device_type(kwargs) not in (None, "cpu")
        or all(_real(item) is not None for item in tree_iter((args, dict(kwargs))) if isinstance(item, Tensor))
    )


def _run(func: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Do it now, on real values. The result is plain."""

    def values(tensor: LazyTensor) -> Tensor:
        real = _real(tensor)
        return ops.whole(tensor._expr) if real is None else real

    args, kwargs = tree_map_only(LazyTensor, values, (args, dict(kwargs)))
    return func(*args, **kwargs)


def _record(func: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Do it later. The result, or each of several, is lazy; a view shares its base's storage."""
    if func.overloadpacket is _ATEN.as_strided:  # counts from the start of a storage, which an expression doesn't have
        return func(_realised(cast(LazyTensor, args[0])), *args[1:], **kwargs)
    there = {"device": torch.device("meta")} if kwargs.get("device") else {}
    try:
        result = func(*_metas(args), **{**_metas(kwargs), **there})
    except NotImplementedError:  # no shape without values
        return _run(func, args, kwargs)
    except RuntimeError as error:
        parts = [item for item in tree_iter((args, dict(kwargs))) if isinstance(item, Tensor)]
        raise misfit(func, [(_name(part), tuple(part.shape)) for part in parts], error) from error
    inputs, keywords = tree_map_only(Tensor, _snapshot, (args, dict(kwargs)))
    storage = cast(LazyTensor, args[0])._storage if func.is_view else None

    def wrap(meta: Tensor, index: int | None) -> LazyTensor:
        return LazyTensor(Op(tuple(meta.shape), meta.stride(), meta.dtype, func, inputs, keywords, index), storage)

    return wrap(result, None) if isinstance(result, Tensor) else [wrap(meta, index) for index, meta in enumerate(result)]


def _metas(items: T) -> T:
    def meta(tensor: Tensor) -> Tensor:
        if isinstance(tensor, LazyTensor):
            return tensor._expr.meta()
        return tensor.detach().to("meta") if tensor.ndim else tensor

    return cast(T, tree_map_only(Tensor, meta, items))


def _snapshot(tensor: Tensor) -> Expr:
    """The values that `tensor` has now, whatever is written to it later."""
    real = _real(tensor)
    return cast(LazyTensor, tensor)._expr if real is None else const(real)


def _realised(tensor: LazyTensor) -> Tensor:
    tensor._storage.realise()
    return cast(Tensor, _real(tensor))


def _write(func: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Run an operation that writes to some of its arguments. Returns those arguments where the operation returns them."""
    named = {argument.name: args[i] for i, argument in enumerate(func._schema.arguments) if i < len(args)} | dict(kwargs)
    if func is _ATEN.copy_.default and not isinstance(out := cast(Tensor, args[0]), LazyTensor):
        read_into(out, cast(Tensor, args[1]).expand(out.shape), full_box(out.shape))
        return out
    infos = {argument.name: argument.alias_info for argument in func._schema.arguments}
    written = {name: info.before_set for name, info in infos.items() if info is not None and info.is_write}
    for name in written.keys() & named.keys():
        for tensor in tree_iter(named[name]):
            if isinstance(tensor, LazyTensor):
                tensor._storage.realise()
    result = _run(func, args, kwargs)
    if len(func._schema.returns) == 1 and (alias := func._schema.returns[0].alias_info) is not None:
        return next((named[name] for name, aliases in written.items() if aliases & alias.before_set), result)
    return result


def _name(tensor: Tensor) -> str:
    names = [source.name for source in sources(tensor)]
    shown = names[:4] + ([f"{len(names) - 4} more"] if len(names) > 4 else [])
    return " + ".join(shown) or "a tensor in memory"
