"""Tensors as the algorithms take them: flat, contiguous, detached from autograd and from its count of versions (as c10d's)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def flat(tensor: Tensor) -> Tensor:
    """All elements of `tensor` in one dim, detached: its own memory where it is contiguous, else a copy.

    Raises `TypeError` for what is not strided memory of the CPU.
    """
    if not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_quantized:
        raise TypeError(f"the shm backend takes dense tensors on the CPU, and this one is {tensor.layout} on {tensor.device}.")
    data = tensor.data
    if data.dim() == 1 and data.is_contiguous():
        return data
    return data.contiguous().view(-1)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of `tensor`: its own memory or those of a copy, as `flat`."""
    return flat(tensor.resolve_conj().resolve_neg()).view(torch.uint8)


def returned(steps: Iterator[None], outputs: Sequence[Tensor], flats: Sequence[Tensor]) -> Iterator[None]:
    """`steps`, and then what they wrote into copies goes back to the tensors that those were made of."""
    copies = [(output.data, copy) for output, copy in zip(outputs, flats, strict=True) if not is_own(output, copy)]
    return _then_return(steps, copies) if copies else steps


def is_own(tensor: Tensor, flat: Tensor) -> bool:
    """Whether `flat` is the memory of `tensor`."""
    return tensor.data_ptr() == flat.data_ptr()


def _then_return(steps: Iterator[None], copies: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    yield from steps
    for output, copy in copies:
        output.copy_(copy.view(output.shape))


def parts(whole: Tensor, tensor: Tensor, splits: Sequence[int], size: int) -> list[Tensor]:
    """`whole`, which is `tensor` flat, cut along dim 0 of `tensor` for `size` ranks: in equal parts, or in `splits` rows.

    Raises `ValueError` where it cannot be cut so.
    """
    rows = tensor.size(0) if tensor.dim() else 1
    if not splits and rows % size:
        raise ValueError(f"{rows} rows cannot be divided evenly over {size} ranks: give the splits.")
    counts = list(splits) or [rows // size] * size
    if len(counts) != size or sum(counts) != rows:
        raise ValueError(f"splits {counts} are not those of {rows} rows over {size} ranks.")
    row = whole.numel() // rows if rows else 0
    return list(whole.split([count * row for count in counts]))
