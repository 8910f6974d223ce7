"""Quantized checkpoints: dequantized while they are loaded, each rank its own part, to the numbers of one process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import shardwise
from lazy_sources import Memory
from llamas import TINY
from shardwise.checkpoint import dequantized
from shardwise.errors import CheckpointError
from shardwise.lazy import lazy, read
from shardwise.loading import load_dequantized

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
E4M3 = torch.float8_e4m3fn


def floats8(*shape: int) -> Tensor:
    """Random, without NaN."""
    return (torch.randn(shape) * 50).to(E4M3)


def bytes_(*shape: int, low: int = 0, high: int = 256) -> Tensor:
    """Random."""
    return torch.randint(low, high, shape, dtype=torch.uint8)


def fp4(code: int) -> float:
    """A number of four bits: a sign, two bits of exponent, one of mantissa."""
    return math.copysign(E2M1[code % 8], -1 if code > 7 else 1)


def half(packed: Tensor, row: int, column: int) -> int:
    """A number of four bits, of two a byte."""
    return int(packed[row, column // 2]) >> 4 * (column % 2) & 15


def each(shape: tuple[int, int], value: Callable[[int, int], float]) -> Tensor:
    """A matrix, number by number."""
    return torch.tensor([[value(r, c) for c in range(shape[1])] for r in range(shape[0])], dtype=torch.float32)


def check(wanted: Tensor, method: str, settings: dict[str, object], stored: dict[str, Tensor]) -> dict[str, Memory]:
    """`a.weight` is `wanted`, whole and in a box, and a box reads no more of the weight than it needs."""
    sources = {f"a.{name}": Memory(tensor) for name, tensor in stored.items()}
    found = dequantized({name: lazy(source) for name, source in sources.items()}, method, settings)
    assert list(found) == ["a.weight"]
    assert found["a.weight"].dtype == torch.float32
    assert torch.equal(read(found["a.weight"], tuple((0, n) for n in wanted.shape)), wanted)
    for source in sources.values():
        source.asked.clear()
    assert torch.equal(read(found["a.weight"], ((4, 6), (16, 32))), wanted[4:6, 16:32])
    return sources


@pytest.mark.parametrize(
    ("block", "scales"), [((4, 16), (3, 3)), (None, (10, 1)), (None, (1,)), (None, (10,)), ((5, 16), (2, 3))]
)
def test_float8(block, scales):
    """Guards: scales one block off, a last block that is cut off stretched over all (of 10 rows in blocks of 4, 10 / 3), scales
    of rows taken for those of columns, and whole weights read for a shard.
    """
    weight, grid = floats8(10, 48), torch.rand(scales) + 0.5
    rows, columns = block or (10 if scales == (1,) else 1, 48)
    spread = grid.reshape(scales if len(scales) == 2 else (-1, 1))
    wanted = each((10, 48), lambda r, c: float(weight[r, c].float() * spread[r // rows, c // columns]))
    settings = {"weight_block_size": list(block) if block else None}
    sources = check(wanted, "fp8", settings, {"weight": weight, "weight_scale_inv": grid, "activation_scale": torch.ones(())})
    assert sources["a.weight"].elements == 2 * 16


def test_float8_with_exponents_and_fp4():
    """Guards: exponents of 2, in bytes or float8, taken for factors; two numbers of a byte exchanged; a sign of zero lost."""
    packed, exponents = bytes_(6, 32), bytes_(6, 2, low=120, high=130)
    wanted = each((6, 64), lambda r, c: fp4(half(packed, r, c)) * 2.0 ** (int(exponents[r, c // 32]) - 127))
    for scales in (exponents, exponents.view(torch.float8_e8m0fnu)):
        sources = check(wanted, "fp8", {}, {"weight": packed.view(torch.int8), "scale": scales})
        assert sources["a.weight"].elements == 2 * 2 * 8  # of each byte, both numbers


def test_compressed_tensors():
    """Guards: integers packed from the other end, the bias of half their range left out, a global scale multiplied."""
    scales, words = torch.rand(6, 2), torch.randint(-(2**31), 2**31, (6, 8), dtype=torch.int32)
    groups = {"config_groups": {"a": {"weights": {"num_bits": 4}}}}
    wanted = each((6, 64), lambda r, c: float((((int(words[r, c // 8]) >> 4 * (c % 8)) & 15) - 8) * scales[r, c // 32]))
    stored = {"weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor([6, 64])}
    check(wanted, "compressed-tensors", groups, stored)
    shorter = {**stored, "weight_shape": torch.tensor([6, 60]), "weight_scale": scales[:, :1]}
    found = dequantized({f"a.{name}": lazy(Memory(t)) for name, t in shorter.items()}, "compressed-tensors", groups)
    assert found["a.weight"].shape == (6, 60)
    eight = torch.randint(-128, 128, (6, 64), dtype=torch.int8)
    check(eight.float() * scales[:, :1], "compressed-tensors", {}, {"weight": eight, "weight_scale": scales[:, :1]})
    packed, fine, all_ = bytes_(6, 32), floats8(6, 4).abs(), torch.tensor([7.0])
    wanted = each((6, 64), lambda r, c: float(fp4(half(packed, r, c)) * (fine[r, c // 16].float() / 7)))
    check(wanted, "compressed-tensors", {}, {"weight_packed": packed, "weight_scale": fine, "weight_global_scale": all_})


REFUSED = {
    "none": ("fp8", {"weight": torch.ones(4, 8)}, "none of its tensors is"),
    "no scales": ("fp8", {"weight": floats8(4, 8)}, "a.weight is stored in float8_e4m3fn and has no scales"),
    "scales": (
        "fp8",
        {"weight": floats8(4, 8), "weight_scale_inv": torch.ones(3, 8)},
        r"(?s)scales of a.weight do not fit.*\[3, 8\]",
    ),
    "blocks": ("mxfp4", {"w_blocks": bytes_(2, 3, 4, 16)}, "a.w_blocks is there without a.w_scales"),
    "block": (
        "mxfp4",
        {"w_blocks": bytes_(2, 3, 4, 16), "w_scales": bytes_(2, 3, 3)},
        r"(?s)scales of a.w do not fit.*\[2, 3, 3\]",
    ),
    "zero": (
        "compressed-tensors",
        {"weight_packed": torch.ones(2, 2), "weight_scale": torch.ones(2, 1), "weight_zero_point": torch.ones(2, 1)},
        "only symmetric weights",
    ),
    "bits": (
        "compressed-tensors",
        {"weight_packed": torch.ones(2, 2, dtype=torch.int32), "weight_scale": torch.ones(2, 1)},
        "only 4 or 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case):
    """Guards: codes loaded as weights, because something that belongs to them is not there."""
    method, stored, says = REFUSED[case]
    with pytest.raises(CheckpointError, match=says):
        dequantized({f"a.{name}": lazy(Memory(tensor)) for name, tensor in stored.items()}, method, {})


def in_float8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As DeepSeek-V3 is stored: the layers' matrices in blocks, here of 16 x 16, the last of them cut off."""
    stored = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "_proj" in name:
            rows, columns = (-(-length // 16) for length in tensor.shape)
            stored[name], stored[f"{name}_scale_inv"] = (tensor.float() * 64).to(E4M3), (torch.rand(rows, columns) + 1) / 64
        else:
            stored[name] = tensor
    return stored


def in_fp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As gpt-oss is stored: its experts in blocks of 32, along the input."""
    stored = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 3:
            experts, inner, outer = tensor.shape
            stored[f"{name}_blocks"] = bytes_(experts, outer, inner // 32, 16)
            stored[f"{name}_scales"] = bytes_(experts, outer, inner // 32, low=118, high=123)
        else:
            stored[name] = tensor
    return stored


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
SIZES = {**TINY, **EXPERTS, "hidden_size": 64, "intermediate_size": 64}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
STORED = {
    "llama": (in_float8, FP8, FineGrainedFP8Config),
    "qwen3_moe": (in_float8, FP8, FineGrainedFP8Config),
    "gpt_oss": (in_fp4, {"quant_method": "mxfp4"}, Mxfp4Config),
}


def _train(path: str, dtype: torch.dtype, out: str) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    model = shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=dtype)
    assert not hasattr(model.config, "quantization_config")
    full = shardwise.full_state_dict(model)
    model.save_pretrained(out)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return full, shardwise.full_gradients(model), loss.item()


IDS = torch.arange(3, 27).view(2, 12)


@pytest.mark.parametrize("kind", STORED)
def test_loading(pool2, tmp_path, kind):
    """Guards: scales of another rank's blocks, codes merged before they are scaled, a config still quantized."""
    store, settings, quantized = STORED[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    save_file(store(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized(dequantize=True), dtype=dtype)
        plain.to(dtype)  # transformers leaves what isn't quantized in the config's dtype
        out = tmp_path / str(dtype)
        full, gradients, loss = pool2.run(_train, str(tmp_path), dtype, str(out))[0]
        assert {name: tensor.dtype for name, tensor in full.items()} == dict.fromkeys(plain.state_dict(), dtype)
        assert all(torch.equal(full[name], tensor) for name, tensor in plain.state_dict().items())
        one = load_dequantized(AutoModelForCausalLM, str(tmp_path), AutoConfig.from_pretrained(tmp_path), dtype)
        assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in full.items())
        again = AutoModelForCausalLM.from_pretrained(out)
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in full.items())
        if dtype == torch.float32:
            wanted = plain(input_ids=IDS, labels=IDS).loss
            wanted.backward()
            assert loss == pytest.approx(wanted.item(), abs=1e-5)
            for name, parameter in plain.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
