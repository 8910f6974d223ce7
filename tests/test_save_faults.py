"""Saving on two processes: what plain transformers reads back, and what is left of a checkpoint when writing fails."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import shardwise
from shardwise.errors import ShardwiseError
from shardwise.model_state import required_state
from shardwise.random_state import same_random_state
from shardwise.storage import writer as storage
from shardwise.testing import RankError

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 63,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS: dict[str, dict[str, object]] = {
    "llama": {},
    "gemma2": {"head_dim": 8},  # tied
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def build(kind: str, seed: int = 0, **options: object) -> PreTrainedModel:
    """A small random model, the same on every rank for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **MODELS[kind]), **options)


def same(path: Path, model: PreTrainedModel) -> bool:
    """Whether plain transformers finds `model` in `path`, bit for bit and without a word."""
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    found, expected = loaded.state_dict(), model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _save(kind: str, seed: int, path: str, options: dict) -> None:
    shardwise.parallelize(build(kind, seed)).save_pretrained(path, **options)


@pytest.mark.parametrize("max_shard_size", ["20KB", "5GB", 1, 40_000])
@pytest.mark.parametrize("kind", MODELS)
def test_files_are_those_of_transformers(kind, max_shard_size, pool2, tmp_path):
    """Guards: an index that names what is not there, other names or splits than transformers', a tied tensor saved twice."""
    model = build(kind)
    pool2.run(_save, kind, 0, str(tmp_path / "ours"), {"max_shard_size": max_shard_size})
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    assert same(tmp_path / "ours", model)
    files = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    if kind == "mixtral" and len(files) > 3:
        return  # transformers keeps what shares a storage in one file, and a layer's experts do; ours are cut to the size asked
    assert files.keys() == wanted.keys()
    assert [name for name in files if name.endswith(".safetensors") and files[name] != wanted[name]] == []
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert name not in files or json.loads(files[name]) == json.loads(wanted[name])


@pytest.mark.parametrize(("before", "after"), [("5GB", "20KB"), ("20KB", "5GB"), ("20KB", "40KB"), ("5GB", "5GB")])
def test_save_over_an_earlier_checkpoint(before, after, pool2, tmp_path):
    """Guards: files of the earlier checkpoint that a loader takes for the new one's."""
    (tmp_path / "notes.txt").write_text("kept")
    pool2.run(_save, "llama", 0, str(tmp_path), {"max_shard_size": before})
    pool2.run(_save, "llama", 1, str(tmp_path), {"max_shard_size": after})
    assert same(tmp_path, build("llama", 1))
    assert not same(tmp_path, build("llama", 0))
    assert (tmp_path / "notes.txt").read_text() == "kept"
    named = {name for index in tmp_path.glob("*.index.json") for name in json.loads(index.read_text())["weight_map"].values()}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == (named or {"model.safetensors"})


def _dtypes(path: str) -> None:
    model = build("llama", dtype=torch.bfloat16)
    shardwise.parallelize(model).save_pretrained(path)


def test_dtype_is_kept(pool2, tmp_path):
    """Guards: a bfloat16 model saved as float32, or a config that says another dtype."""
    pool2.run(_dtypes, str(tmp_path))
    assert same(tmp_path, build("llama", dtype=torch.bfloat16))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def _attempt(seed: int, path: str, fault: str) -> tuple[str, str, float, bool]:
    """Save with a fault on the first rank; then, with the ranks still in step, use the model."""
    model = shardwise.parallelize(build("llama", seed))
    start, name, text = time.monotonic(), "saved", ""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            _break(patch, fault)
        try:
            model.save_pretrained(path, max_shard_size="20KB")
        except (ShardwiseError, OSError) as error:
            name, text = type(error).__name__, str(error)
    seconds = time.monotonic() - start
    full = shardwise.full_state_dict(model)
    whole = full is None or all(torch.equal(full[key], tensor) for key, tensor in build("llama", seed).state_dict().items())
    same_random_state(required_state(model).mesh)
    return name, text, seconds, whole


def _break(patch: pytest.MonkeyPatch, fault: str) -> None:
    def full_disk(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if fault == "full disk":
        real, left = storage._write_all, [7]

        def write(file: object, data: memoryview) -> None:
            left[0] -= 1
            full_disk() if left[0] < 0 else real(file, data)

        patch.setattr(storage, "_write_all", write)
    elif fault == "publishing":
        patch.setattr(storage, "publish", full_disk)
    elif fault == "config":
        patch.setattr("shardwise.saving.description_files", full_disk)
    elif fault == "opening":
        patch.setattr(storage, "open_staging", full_disk)


@pytest.mark.parametrize("fault", ["full disk", "publishing", "config", "opening"])
def test_a_writer_that_fails(fault, pool2, tmp_path):
    """Guards: a failure that only the writing rank hears of, while the other waits or takes the checkpoint for saved; an
    earlier checkpoint that is broken; files left behind.
    """
    pool2.run(_save, "llama", 0, str(tmp_path), {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    first, second = pool2.run(_attempt, 1, str(tmp_path), fault)
    assert first[0] in ("CheckpointError", "OSError")
    assert second[0] == "CheckpointError"
    assert "No space left on device" in first[1]
    assert "the writing rank failed" in second[1]
    assert max(first[2], second[2]) < 10
    assert first[3]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert same(tmp_path, build("llama"))
    pool2.run(_save, "llama", 1, str(tmp_path), {})
    assert same(tmp_path, build("llama", 1))


def test_a_path_that_is_a_file(pool2, tmp_path):
    """Guards: a rank that hangs because the other could not make the directory."""
    path = tmp_path / "model"
    path.write_text("a file")
    for name, text, seconds, _ in pool2.run(_attempt, 0, str(path), ""):
        assert name == "CheckpointError"
        assert str(path) in text or "writing rank failed" in text
        assert seconds < 10
    assert path.read_text() == "a file"


def _no_path() -> str:
    model = shardwise.parallelize(build("llama"))
    with pytest.raises(TypeError) as caught:
        model.save_pretrained(None)
    return str(caught.value)


def test_no_path_at_all(pool2):
    """Guards: an argument that only the writing rank looks at, so that the other waits for it."""
    assert len(pool2.run(_no_path, timeout=30.0)) == 2


def _refused(options: dict) -> str:
    model = shardwise.parallelize(build("llama"))
    with pytest.raises(ShardwiseError) as caught:
        model.save_pretrained("nowhere", **options)
    return str(caught.value)


@pytest.mark.parametrize("option", ["push_to_hub", "state_dict", "max_shard_sise"])
def test_options_that_cannot_be_kept(option, pool2):
    """Guards: a keyword that is ignored."""
    assert all(option in text for text in pool2.run(_refused, {option: True}))
    assert not os.path.exists("nowhere")


def _raise_on_rank(path: str) -> None:
    model = shardwise.parallelize(build("llama"))
    if dist.get_rank() == 1:
        raise ValueError("before saving")
    model.save_pretrained(path, timeout=1.0)


def test_a_rank_that_never_comes(pool2, tmp_path):
    """Guards: a checkpoint of one rank's shards; a hang."""
    with pytest.raises(RankError, match=r"before saving|had not called it"):
        pool2.run(_raise_on_rank, str(tmp_path), timeout=30.0)
    assert not list(tmp_path.iterdir())


def _read(path: str, size: int) -> list[Tensor]:
    model = shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", tp_size=size)
    return [model(torch.arange(12).view(1, 12)).logits.detach()]


@pytest.mark.parametrize("kind", MODELS)
def test_saved_by_two_and_read_by_four(kind, pool2, pool4, tmp_path):
    """Guards: files that only the number of ranks that wrote them can read."""
    pool2.run(_save, kind, 0, str(tmp_path), {"max_shard_size": "20KB"})
    with torch.no_grad():
        expected = build(kind).eval()(torch.arange(12).view(1, 12)).logits
    for (logits,) in pool4.run(_read, str(tmp_path), 4):
        assert (logits - expected).abs().max() < 1e-5
