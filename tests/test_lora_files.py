"""PEFT's adapters on a parallel model: saved, loaded, added in every way, several at a time, and those that are refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import shardwise
from adapted import EVERYTHING, LINEARS, adapter, logits_of, lora, plain
from figures import gradient_error, gradients
from models import batches, checkpoint
from on_ranks import load, world
from shardwise.errors import MismatchError, MissingRankError, ShardwiseError
from shardwise.rendezvous import meet

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # PEFT asks by the old name
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Could not find a config file",
    "ignore:The following (rank|alpha)_pattern keys did not match",  # of the half of a fused weight that a layer hasn't
    "ignore:Setting fan_in_fan_out|fan_in_fan_out is set to False",
    "ignore:.*LoRA tensor.* have invalid shape",  # lora_bias has one dim
)


def save(path: Path, folder: Path, out: Path) -> None:
    """On a rank: the adapter goes through the ranks, and is saved by PEFT and by transformers."""
    model = PeftModel.from_pretrained(load(path), folder, is_trainable=True)
    model.save_pretrained(out / "peft", is_main_process=dist.get_rank() == 0)
    inner = load(path)
    inner.load_adapter(folder)
    inner.save_pretrained(out / "transformers")
    fresh = load(path)
    fresh.add_adapter(lora(target_modules=["q_proj", "o_proj"]))
    fresh.save_pretrained(out / "fresh")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"target_modules": EVERYTHING}),
        ("qwen2", {"target_modules": LINEARS, "bias": "all"}),
        ("qwen3_moe", {"target_modules": "all-linear"}),
        ("phi3", {"target_modules": ["qkv_proj", "down_proj"], "use_dora": True}),
    ],
)
def test_saved_adapter_is_the_ordinary_one(name, changes, pool2, tmp_path_factory):
    """Guards: a file with one rank's part, or with the parts in another order. Bit for bit: nothing is computed."""
    path, out = checkpoint(tmp_path_factory, name), tmp_path_factory.mktemp("saved")
    folder = adapter(path, out / "trained", **changes)
    pool2.run(save, path, folder, out)
    wanted = load_file(folder / "adapter_model.safetensors")
    for by in ("peft", "transformers"):
        found = load_file(out / by / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), by
        assert (out / by / "adapter_config.json").exists()
    if name != "llama":
        return
    shapes = {key: tensor.shape for key, tensor in load_file(out / "fresh/adapter_model.safetensors").items()}
    assert shapes == {key: tensor.shape for key, tensor in wanted.items() if "q_proj" in key or "o_proj" in key}


def load_both(folder: Path) -> Tensor:
    """On a rank: the model that an adapter is for, and the adapter, by the adapter's directory; and what a full disk says."""
    model = shardwise.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr("safetensors.torch.save_file", full_disk)
        with pytest.raises(OSError if dist.get_rank() == 0 else MismatchError, match=r"No space|failed on rank 0"):
            model.save_pretrained(folder / "again")
    with torch.no_grad():
        return model(batches()[0].input_ids).logits


def full_disk(*arguments: object, **options: object) -> None:
    """In place of what writes."""
    raise OSError("No space left on device")


def test_an_adapter_brings_its_model(pool2, tmp_path_factory):
    """Guards: a directory with an adapter that is no model, where transformers loads both; a rank that waits for one whose
    disk is full.
    """
    path = checkpoint(tmp_path_factory, "llama")
    folder = adapter(path, tmp_path_factory.mktemp("adapter"), target_modules=EVERYTHING)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(batches()[0].input_ids).logits
        bare = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(batches()[0].input_ids).logits
    assert (expected - bare).abs().max() > 1e-3
    for logits in pool2.run(load_both, folder, timeout=60.0):
        assert (logits - expected).abs().max() < 1e-5


def save_on_one_rank(path: Path, folder: Path) -> str:
    """On a rank: only the first one saves."""
    model = get_peft_model(load(path), lora())
    if dist.get_rank():
        return ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shardwise.gathering, "meet", partial(meet, timeout=0.5))
        with pytest.raises(MissingRankError) as error:
            model.save_pretrained(folder)
    return str(error.value)


def test_saving_on_one_rank_raises(pool2, tmp_path_factory):
    """Guards: a save on the first rank only that waits for the others for ever."""
    message = pool2.run(save_on_one_rank, checkpoint(tmp_path_factory, "llama"), tmp_path_factory.mktemp("one"))[0]
    assert "rank 1 had not called it" in message


# --- ways in ---


def ways_in(path: Path, folder: Path, dora: bool) -> list[tuple[Tensor, dict[str, Tensor] | None]]:
    """On a rank: logits and gradients with the same adapter, put in by every way there is."""

    def by_parallelize(inside: bool) -> nn.Module:
        model = plain(path, folder)
        shardwise.parallelize(model.get_base_model() if inside else model, world("tp"))
        return model

    def by_other_styles() -> nn.Module:
        model = plain(path, folder)
        plan = {f"layers.*.mlp.{name}_proj": "colwise_gather_output" for name in ("up", "gate")}
        plan |= {"layers.*.mlp.down_proj": "rowwise_split_input"}
        return shardwise.parallelize(model, world("tp"), plan)

    def by_transformers() -> nn.Module:
        model = load(path)
        model.load_adapter(folder, is_trainable=True)
        return model

    def by_second() -> nn.Module:
        model = get_peft_model(load(path), lora(target_modules=["q_proj", "down_proj"], use_dora=dora), "other")
        model.load_adapter(folder, "default", is_trainable=True)  # on layers that have an adapter, and on others
        model.set_adapter("default")
        return model

    def by_meta() -> nn.Module:
        return PeftModel.from_pretrained(load(path), folder, is_trainable=True, low_cpu_mem_usage=True)

    found, ways = [], [lambda: by_parallelize(False), lambda: by_parallelize(True), by_transformers, by_second, by_meta]
    for way in (*ways, *([] if dora else [by_other_styles])):
        model = way().train()
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        batches()[1].loss(model).backward()
        found.append((logits_of(model), gradients(inner)))
    return found


@pytest.mark.parametrize("dora", [False, True])
def test_every_way_to_add_an_adapter(dora, pool2, tmp_path_factory):
    """Guards: an adapter that one of the ways leaves as it was: second ones, ones that were there before the model became
    parallel, ones of transformers' own methods.
    """
    path = checkpoint(tmp_path_factory, "llama")
    folder = adapter(path, tmp_path_factory.mktemp("adapter"), use_dora=dora)
    reference = plain(path, folder)
    batches()[1].loss(reference).backward()
    wanted, logits = gradients(reference.get_base_model()), logits_of(reference)
    for found, grads in pool2.run(ways_in, path, folder, dora)[0]:
        torch.testing.assert_close(found, logits, atol=2e-4, rtol=1e-4)
        assert gradient_error({name: grad for name, grad in grads.items() if ".other." not in name}, wanted) < 1e-3


def fresh_adapters(path: Path, seed: int, targets: list[str], dora: bool) -> tuple[dict[str, Tensor] | None, str]:
    """On a rank, whose seed is another one than the first rank's."""
    inner = load(path)
    torch.manual_seed(seed + dist.get_rank())
    get_peft_model(inner, lora(target_modules=targets, use_dora=dora))
    text = repr(inner.base_model.get_submodule("layers.0.self_attn.o_proj")) if "o_proj" in targets else ""
    full = shardwise.full_state_dict(inner)
    shardwise.unparallelize(inner)
    if full is not None:
        assert all(torch.equal(full[name], tensor) for name, tensor in inner.state_dict().items())
    return full, text


@pytest.mark.parametrize(
    ("name", "targets", "dora"),
    [
        ("llama", LINEARS, False),
        ("gpt2", ["c_attn", "c_proj"], False),
        ("qwen3_moe", ["o_proj", "gate_proj", "up_proj"], False),
        ("llama", LINEARS, True),
        ("gpt2", ["c_attn", "c_proj"], True),
    ],
)
def test_new_adapter_is_that_of_one_process(name, targets, dora, pool2, tmp_path_factory):
    """Guards: a row-wise A drawn at its local width (of another variance than the layer's), the same for every rank; replicas
    that start out different; and layers of which PEFT takes the width from a rank's part of the weight.
    """
    path = checkpoint(tmp_path_factory, name)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(3)
    get_peft_model(reference, lora(target_modules=targets, use_dora=dora))
    full, text = pool2.run(fresh_adapters, path, 3, targets, dora)[0]
    assert full.keys() == reference.state_dict().keys()
    # a row-wise A is not sent: each rank keeps its part of what it drew
    same = [name for name, tensor in reference.state_dict().items() if torch.equal(full[name], tensor)]
    assert len(same) == len(full)
    assert name == "gpt2" or "(default): RowwiseLinear(in_features=32 of 64, out_features=3, bias=False, tp=2)" in text


# --- sums of adapters ---


def weighted(path: Path, first: Path, second: Path) -> tuple[Tensor, str]:
    """On a rank: the logits of a sum of adapters, and what a decomposition of one says."""
    model = PeftModel.from_pretrained(load(path), first, "a")
    model.load_adapter(second, "b")
    logits_of(model)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "sum", combination_type="linear")
    model.set_adapter("sum")
    found = logits_of(model.eval())
    model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "svd", combination_type="svd")
    with pytest.raises(ShardwiseError) as error:
        logits_of(model)
    return found, str(error.value)


def test_weighted_adapters(pool2, tmp_path_factory):
    """Guards: an adapter made of the ranks' parts of others, cut once more, or another one on every rank."""
    path = checkpoint(tmp_path_factory, "llama")
    folders = [adapter(path, tmp_path_factory.mktemp("adapter"), seed) for seed in (5, 6)]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), folders[0], "a")
    model.load_adapter(folders[1], "b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "sum", combination_type="linear")
    model.set_adapter("sum")
    found, error = pool2.run(weighted, path, *folders)[0]
    torch.testing.assert_close(found, logits_of(model.eval()), atol=2e-4, rtol=1e-4)
    assert "differs between ranks" in error


# --- in company ---


def company(path: Path, folder: Path) -> list[dict[str, Tensor] | None]:
    """On a rank: gradients under activation checkpointing, under torch.compile, with overlap, and in GPT-2's Conv1D."""

    def checkpointing() -> PeftModel:
        model = PeftModel.from_pretrained(load(path), folder, is_trainable=True)
        model.gradient_checkpointing_enable()
        return model

    def compiled() -> PeftModel:
        model = PeftModel.from_pretrained(load(path), folder, is_trainable=True)
        model.get_base_model().model.compile(fullgraph=True, backend="aot_eager")
        return model

    def overlapped() -> PeftModel:
        return PeftModel.from_pretrained(load(path, overlap=True), folder, is_trainable=True)

    found = []
    for make in (checkpointing, compiled, overlapped):
        model = make().train()
        batches()[1].loss(model).backward()
        found.append(gradients(model.get_base_model()))
    return found


def test_adapters_in_company(pool2, tmp_path_factory):
    """Guards: a recomputed or compiled forward that goes another way than the eager one."""
    path = checkpoint(tmp_path_factory, "llama")
    folder = adapter(path, tmp_path_factory.mktemp("adapter"))
    reference = plain(path, folder).train()
    batches()[1].loss(reference).backward()
    wanted = gradients(reference.get_base_model())
    for found in pool2.run(company, path, folder)[0]:
        assert gradient_error(found, wanted) < 1e-3
