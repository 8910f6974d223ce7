"""Quantized checkpoints as ordinary ones: each weight and its scales become one lazy tensor, and nothing is read.

`fp8`: a float8 `weight` and a scale for each block of it (DeepSeek-V3, arXiv:2412.19437), for each row, or for all; or two FP4
numbers a byte, and a scale for 32 of them.
`mxfp4`: `*_blocks` of 32 FP4 numbers, two a byte; `*_scales`, the exponent of 2 of each, biased by 127 (OCP Microscaling 1.0).
`compressed-tensors`: float8 or int8 and scales, or `weight_packed`: integers of 4 or 8 bits in int32, or FP4, two a byte.

All arithmetic is done in float32, from which the model's own dtype is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from shardwise.checkpoint.packed import scale_values, spread, unpack_fp4, unpack_integers
from shardwise.errors import CheckpointError, describe
from shardwise.lazy import LazyTensor

Tensors = Mapping[str, LazyTensor]
Settings = Mapping[str, Any]
_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")  # beside a `weight`
_COMPRESSED = {f"weight_{name}" for name in ("packed", "scale", "shape", "zero_point", "g_idx", "global_scale")}
_OF_ACTIVATIONS = ("activation_scale", "input_scale", "input_global_scale", "output_scale", "qscale_act", "k_scale", "v_scale")


def dequantized(tensors: Tensors, method: str, settings: Settings) -> dict[str, LazyTensor]:
    """The tensors that the checkpoint would hold without quantization: quantized weights in float32, the others as they are.
    Scales of activations are left out.

    Args:
        tensors: the checkpoint (see `open_checkpoint`).
        method, settings: the config's `quantization_config`, and its `quant_method`: one of `METHODS`.

    Raises:
        CheckpointError: nothing is quantized, a weight has no scales, or they don't fit it.
    """
    found = METHODS[method](tensors, settings)
    if all(tensors.get(key) is tensor for key, tensor in found.items()):
        raise _misfit(f"the config says that its weights are quantized ({method}), and none of its tensors is")
    return {key: tensor for key, tensor in found.items() if key.rpartition(".")[2] not in _OF_ACTIVATIONS}


def _fp8(tensors: Tensors, settings: Settings) -> dict[str, LazyTensor]:
    block = tuple(settings.get("weight_block_size") or ())
    found, read = dict[str, LazyTensor](), set[str]()
    for key, tensor in tensors.items():
        looked_for = _scale_names(key)
        scales = next((name for name in looked_for if name in tensors), None)
        if _is_float8(tensor) and scales is None:
            raise _misfit(f"{key} is stored in {_plain(tensor)} and has no scales", looked_for=looked_for)
        if scales is not None and (_is_float8(tensor) or tensor.dtype in (torch.int8, torch.uint8)):
            values = tensor.float() if _is_float8(tensor) else unpack_fp4(tensor)
            found[key] = _scaled(key, values, scales, scale_values(tensors[scales]), block)
            read.add(scales)
        else:
            found[key] = tensor
    return {key: tensor for key, tensor in found.items() if key not in read}


def _mxfp4(tensors: Tensors, settings: Settings) -> dict[str, LazyTensor]:
    found = dict[str, LazyTensor]()
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("_")
        if part not in ("blocks", "scales"):
            found[key] = tensor
            continue
        blocks, scales = tensors.get(f"{name}_blocks"), tensors.get(f"{name}_scales")
        if blocks is None or scales is None:
            raise _misfit(f"{key} is there without {name}_{'scales' if part == 'blocks' else 'blocks'}")
        if blocks.shape[:-1] != scales.shape or blocks.ndim != 4:
            shapes = [f"{name}_blocks: {list(blocks.shape)}", f"{name}_scales: {list(scales.shape)}"]
            raise _misfit(f"the scales of {name} do not fit it", found=shapes)
        values = unpack_fp4(blocks) * scale_values(scales).unsqueeze(-1)
        found[name] = cast(LazyTensor, values.flatten(2).transpose(1, 2))
    return found


def _compressed(tensors: Tensors, settings: Settings) -> dict[str, LazyTensor]:
    found, owners = dict[str, LazyTensor](), {key.rpartition(".")[0] for key in tensors if key.endswith(".weight_scale")}
    for key, tensor in tensors.items():
        owner, _, child = key.rpartition(".")
        if owner not in owners or child not in {"weight", *_COMPRESSED}:
            found[key] = tensor
        elif child in ("weight_zero_point", "weight_g_idx"):
            raise _misfit(f"{key} is there; only symmetric weights, in their own order, can be dequantized")
        elif child in ("weight", "weight_packed"):
            scales = scale_values(tensors[f"{owner}.weight_scale"])
            if f"{owner}.weight_global_scale" in tensors:
                scales = scales / tensors[f"{owner}.weight_global_scale"].float()
            values = _compressed_values(key, tensor, tensors.get(f"{owner}.weight_shape"), settings)
            found[f"{owner}.weight"] = _scaled(key, values, f"{owner}.weight_scale", scales)
    return found


def _compressed_values(key: str, tensor: Tensor, shape: Tensor | None, settings: Settings) -> Tensor:
    if tensor.dtype != torch.int32:
        return unpack_fp4(tensor) if tensor.dtype == torch.uint8 else tensor.float()
    widths = {(group.get("weights") or {}).get("num_bits") for group in (settings.get("config_groups") or {}).values()}
    if widths not in ({4}, {8}):
        raise _misfit(f"{key} holds packed integers of {sorted(map(str, widths))} bits, and only 4 or 8 can be dequantized")
    values = unpack_integers(tensor, widths.pop())
    return values if shape is None else values.narrow(-1, 0, int(shape[-1]))


METHODS: Mapping[str, Callable[[Tensors, Settings], dict[str, LazyTensor]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
}


def _scaled(key: str, values: Tensor, scale_key: str, scales: Tensor, block: tuple[int, ...] = ()) -> LazyTensor:
    try:
        return cast(LazyTensor, values * spread(scales, tuple(values.shape), block))
    except ValueError as error:
        shapes = [f"{key}: {list(values.shape)}", f"{scale_key}: {list(scales.shape)}"]
        raise _misfit(f"the scales of {key} do not fit it", found=shapes, why=[str(error)]) from error


def _scale_names(key: str) -> list[str]:
    owner, _, child = key.rpartition(".")
    return [f"{owner}.{name}" for name in _SCALES] if child == "weight" else [f"{key}_scale_inv", f"{key}_scale"]


def _is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize == 1 and tensor.dtype != torch.float8_e8m0fnu


def _plain(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _misfit(what: str, **facts: list[str]) -> CheckpointError:
    way_out = ["take quantization_config out of config.json, of weights that are not quantized, or", "download the files again"]
    return CheckpointError(describe(f"The quantized checkpoint can't be read: {what}.", **facts, either=way_out))
