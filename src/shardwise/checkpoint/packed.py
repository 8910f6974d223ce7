"""The numbers of quantized weights: packed into bytes, and multiplied by scales. Everything is lazy where its inputs are."""

from __future__ import annotations

import torch
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_WORD = 32  # bits


def unpack_fp4(packed: Tensor) -> Tensor:
    """(..., n) bytes of two FP4 numbers (e2m1) each, the low half first -> (..., 2 n) float32."""
    codes, table = packed.view(torch.uint8), torch.tensor(_E2M1)
    return torch.stack([table.take(half.long()) for half in (codes.bitwise_and(15), codes >> 4)], -1).flatten(-2)


def unpack_integers(packed: Tensor, bits: int) -> Tensor:
    """(..., n) int32 of 32 / bits numbers each, the lowest first, biased by half their range -> (..., n 32 / bits) float32."""
    parts = [(packed >> shift).bitwise_and((1 << bits) - 1) for shift in range(0, _WORD, bits)]
    return torch.stack(parts, -1).flatten(-2).float() - float(1 << (bits - 1))


def scale_values(scales: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents of 2, biased by 127 (e8m0)."""
    return torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()


def spread(scales: Tensor, shape: tuple[int, ...], block: tuple[int, ...] = ()) -> Tensor:
    """`scales` in a shape that multiplies a weight of `shape` (..., rows, columns).

    Args:
        scales: one number, one for each row, or (..., rows of blocks, columns of blocks).
        block: rows and columns of a block, of which the last may be cut off. Where they don't fit, or are not given, blocks are
            as even as their number says.

    Raises `ValueError` where they can't be of that weight.
    """
    if scales.numel() == 1:
        return scales.reshape(())
    scales = scales.unsqueeze(-1) if scales.ndim == 1 else scales
    if scales.ndim != len(shape) or scales.shape[:-2] != shape[:-2]:
        raise ValueError(f"scales of shape {list(scales.shape)}")
    for dim in (-2, -1):
        length, count = shape[dim], scales.shape[dim]
        if count in (1, length):
            continue
        size = block[dim] if len(block) == 2 and -(-length // block[dim]) == count else length // count
        if -(-length // size) != count:
            raise ValueError(f"{count} blocks of {length}")
        scales = _repeated(scales, dim, size).narrow(dim, 0, length)
    return scales


def _repeated(tensor: Tensor, dim: int, times: int) -> Tensor:
    """Each element along `dim` (negative) `times` over, one after the other."""
    wide = tensor.unsqueeze(dim)
    shape = list(wide.shape)
    shape[dim] = times
    return wide.expand(shape).flatten(dim - 1, dim)
