"""Which attention kernel a device would take: fake tensors are on the CPU, where torch would choose that for CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_HEAD = 256


@contextmanager
def attention_of(device: str) -> Iterator[None]:
    """In the block, attention takes the kernels of `device`: "cuda", or whichever torch has for CPUs.

    torch's function is replaced: a mode for functions is off in backward, where activation checkpointing runs forward again.
    """
    before = functional.scaled_dot_product_attention
    if device == "cuda":
        functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `scaled_dot_product_attention`, chosen as torch does for CUDA: flash, else memory-efficient, else over scores."""
    operators = torch.ops.aten
    features = query.shape[-1]
    flash = attn_mask is None and query.dtype in _FLASH_DTYPES and value.shape[-1] == features <= _FLASH_HEAD
    if flash:
        output: Tensor = operators._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    elif query.shape[-3] == key.shape[-3]:
        graph = any(tensor.requires_grad for tensor in (query, key, value))
        output = operators._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, graph, dropout_p, is_causal, scale=scale
        )[0]
    else:
        output = operators._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    return output
