"""PEFT's adapters on a parallel model: the numbers and the tokens of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from adapted import EVERYTHING, adapter, compare, lora, measure, measure_sharded, plain
from figures import gradient_error, gradients
from models import batches, checkpoint
from on_ranks import load
from shardwise import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # PEFT asks by the old name
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Could not find a config file",
    "ignore:The following (rank|alpha)_pattern keys did not match",  # of the half of a fused weight that a layer hasn't
    "ignore:Setting fan_in_fan_out|fan_in_fan_out is set to False",
    "ignore:.*LoRA tensor.* have invalid shape",  # lora_bias has one dim
)
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 127, "n_positions": 48}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": None}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"target_modules": EVERYTHING}),
        ("qwen2", {"use_rslora": True, "lora_bias": True, "bias": "all", "target_modules": ["q_proj", "v_proj"]}),
        ("gemma2", {"modules_to_save": ["o_proj"], "target_modules": ["q_proj", "k_proj", "down_proj"]}),
        ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
        ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "use_dora": True}),
        ("qwen2", {"use_dora": True, "lora_dropout": 1e-9, "bias": "all"}),  # that drops nothing, but goes another way
        ("deepseek_v3", {"target_modules": "all-linear"}),
        ("qwen3_moe", {"target_modules": "all-linear"}),
        ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
)
def test_adapter_of_two_ranks_is_that_of_one_process(pool2, tmp_path_factory, name, changes):
    """Guards: an A behind a column-wise layer whose gradient is a part, a B as long as the whole layer, a row-wise A whose
    product is not summed or summed twice, in logits, gradients, clipping, tokens and merging. And the same of stacked experts
    and of a latent projection, whose rotary features a rank's heads alone read.
    """
    path = checkpoint(tmp_path_factory, name)
    folder = adapter(path, tmp_path_factory.mktemp(f"adapter-{name}"), **changes)
    compare(pool2.run(measure_sharded, path, folder), measure(plain(path, folder)))


@pytest.mark.parametrize("dora", [False, True])
def test_adapter_of_four_ranks_that_share_kv_heads(dora, pool4, tmp_path_factory):
    """Guards: B of a shared KV head, whose gradient each of its ranks has a part of, and of which only one may count in the
    norm; and so DoRA's magnitudes.
    """
    path = checkpoint(tmp_path_factory, "llama")
    folder = adapter(path, tmp_path_factory.mktemp("adapter"), use_dora=dora)
    compare(pool4.run(measure_sharded, path, folder), measure(plain(path, folder)))


def padded(model: PeftModel) -> dict[str, Tensor] | None:
    """Gradients of the adapter of an embedding whose padding id is among the ids."""
    batches()[0].loss(model.train()).backward()
    return gradients(model.get_base_model())


def padded_sharded(path: Path, folder: Path, pad: int) -> dict[str, Tensor] | None:
    """On a rank."""
    return padded(PeftModel.from_pretrained(load(path, pad_token_id=pad), folder, is_trainable=True))


def test_padding_id_of_an_adapted_embedding(pool2, tmp_path_factory):
    """Guards: a padding id counted from the first row of a rank's part of the vocabulary, in an adapter of all of it: it would
    be trained, or another id would not.
    """
    path, pad = checkpoint(tmp_path_factory, "llama"), int(batches()[0].input_ids.max())
    assert pad >= 64  # of the second rank
    folder = adapter(path, tmp_path_factory.mktemp("adapter"), target_modules=["embed_tokens"])
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, pad_token_id=pad)
    wanted = padded(PeftModel.from_pretrained(base, folder, is_trainable=True))
    for found in pool2.run(padded_sharded, path, folder, pad)[:1]:
        assert gradient_error(found, wanted) < 1e-3


# --- files ---


@pytest.mark.parametrize("dora", [False, True])
def test_adapter_of_conv1d(dora, pool2, tmp_path_factory):
    """Guards: an adapter around a layer that keeps its weight transposed, of which PEFT reads the local width."""
    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained(path)
    changes = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": dora}
    folder = adapter(path, tmp_path_factory.mktemp("adapter"), **changes)
    compare(pool2.run(measure_sharded, path, folder), measure(plain(path, folder)))


def test_adapter_of_a_mixer(pool2, tmp_path_factory):
    """Guards: an adapter around a product in the middle of a parallel region: A's product not summed, B's gradient that of the
    rank's own channels.
    """
    path = tmp_path_factory.mktemp("mamba")
    tiny.build("mamba").save_pretrained(path)
    folder = adapter(path, tmp_path_factory.mktemp("adapter"), target_modules=["in_proj", "x_proj"])
    compare(pool2.run(measure_sharded, path, folder), measure(plain(path, folder)))


def masks(path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """On a rank, in training with dropout in attention: which elements the adapters of q and of o drop out."""
    inner = load(path, attention_dropout=0.5)
    model = get_peft_model(inner, lora(lora_dropout=0.5, target_modules=["q_proj", "v_proj", "o_proj"])).train()
    found: dict[str, list[Tensor]] = {"v_proj": [], "o_proj": []}
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.default") and (kind := name.split(".")[-3]) in found:
            module.register_forward_hook(lambda _, __, output, kind=kind: found[kind].append(output == 0))
    model(input_ids=batches()[0].input_ids)
    return found["v_proj"], found["o_proj"]


def test_dropout_of_adapters(pool2, tmp_path_factory):
    """Guards: masks of replicated inputs that differ between ranks (inside of attention, whose random stream is a rank's own),
    and masks of local features that are alike.
    """
    (whole, local), (whole_1, local_1) = pool2.run(masks, checkpoint(tmp_path_factory, "llama"))
    assert len(whole) == len(local) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole, whole_1, strict=True))
    assert all(0.3 < mask.float().mean() < 0.7 for mask in (*whole, *local))
    assert all((a == b).float().mean() < 0.7 for a, b in zip(local, local_1, strict=True))
