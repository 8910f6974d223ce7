"""Reductions of the ranks' tensors, in rank order, so that the result has the same bits wherever it is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

Combine = Callable[..., Tensor]

_BINARY: dict[str, Combine] = {
    "SUM": torch.add,
    "AVG": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}

_OF_BOOLS: dict[str, Combine] = {
    "SUM": torch.logical_or,
    "PRODUCT": torch.logical_and,
    "MIN": torch.logical_and,
    "MAX": torch.logical_or,
}

_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64}


@cache
def reducer(op: str, dtype: torch.dtype, size: int) -> Callable[[Tensor, Sequence[Tensor]], None]:
    """The function `(out, sources)` that writes the reduction of `size` sources of `dtype` into `out`, all of one shape.

    Types of less than 32 bits are summed in float32 and rounded once. `out` may be one of the sources where there are at most
    two. Raises `TypeError` for what has no meaning: bits of floating-point numbers, the mean or order of booleans or complex.
    """
    number = dtype.is_floating_point or dtype.is_complex
    if op.startswith("B") and number:
        raise TypeError(f"{op} is for integers and booleans, and the tensor is {dtype}.")
    if (op == "AVG" and dtype == torch.bool) or (op in ("MIN", "MAX") and dtype.is_complex):
        raise TypeError(f"{op} has no meaning for {dtype}.")
    if dtype == torch.uint64:
        return _as_signed(op, size)
    combine = _OF_BOOLS.get(op, _BINARY[op]) if dtype == torch.bool else _BINARY[op]
    wide = _accumulator(op, dtype, size)
    if wide is None and op != "AVG":
        return _plain(combine)
    return _through(wide or dtype, combine, size if op == "AVG" else 1)


def _as_signed(op: str, size: int) -> Callable[[Tensor, Sequence[Tensor]], None]:
    """For uint64, which torch can do little with: the same bits as int64; shifted by half the range to be ordered."""
    if op == "AVG":
        raise TypeError("AVG has no meaning for torch.uint64: torch cannot divide it.")
    reduce = reducer(op, torch.int64, size)
    shift = torch.iinfo(torch.int64).min if op in ("MIN", "MAX") else 0

    def into(out: Tensor, sources: Sequence[Tensor]) -> None:
        signed = out.view(torch.int64)
        reduce(signed, [source.view(torch.int64) ^ shift for source in sources])
        signed ^= shift

    return into


def _accumulator(op: str, dtype: torch.dtype, size: int) -> torch.dtype | None:
    """What to compute in where that is not `dtype` itself."""
    if dtype.is_floating_point and dtype.itemsize < 4 and op in ("SUM", "AVG", "PRODUCT"):
        # The sum of two is rounded once anyway, by the addition itself, where there is one.
        return None if size <= 2 and dtype.itemsize == 2 and op != "AVG" else torch.float32
    if dtype.is_floating_point and dtype.itemsize < 2:
        return torch.float32
    return _WIDER.get(dtype)


def _plain(combine: Combine) -> Callable[[Tensor, Sequence[Tensor]], None]:
    def into(out: Tensor, sources: Sequence[Tensor]) -> None:
        if len(sources) == 1:
            out.copy_(sources[0])
            return
        combine(sources[0], sources[1], out=out)
        for source in sources[2:]:
            combine(out, source, out=out)

    return into


def _through(wide: torch.dtype, combine: Combine, divisor: int) -> Callable[[Tensor, Sequence[Tensor]], None]:
    def into(out: Tensor, sources: Sequence[Tensor]) -> None:
        total = sources[0].to(wide, copy=True)
        for source in sources[1:]:
            combine(total, source.to(wide), out=total)
        if divisor > 1:
            total.div_(divisor, rounding_mode=None if wide.is_floating_point or wide.is_complex else "trunc")
        out.copy_(total)

    return into
