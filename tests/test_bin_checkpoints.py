"""Checkpoints in torch's own format, `pytorch_model.bin`: the same shards as from safetensors, and the same guarantees."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import shardwise
from llamas import TINY
from shardwise.checkpoint import open_checkpoint, read_whole
from shardwise.errors import CheckpointError, MismatchError, ShardwiseError
from shardwise.lazy import read

IDS = torch.arange(3, 27).view(2, 12)
MODELS: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": True},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


class _Program:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("echo unpickled",)


def _saved(content: object, **options: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def _old(content: object) -> bytes:
    return _saved(content, _use_new_zipfile_serialization=False)


def _compressed(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    return stream.getvalue()


MATRIX = torch.arange(32.0).view(8, 4)
VIEWS = {
    "whole": MATRIX,
    "transposed": MATRIX.t(),
    "rows": MATRIX[2:5],
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "parameter": nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
    "spread": torch.ones(1, 3).expand(5, 3),
    "numbers": torch.arange(5),
}


@pytest.mark.parametrize("write", [_saved, _old, lambda views: _compressed(_saved(views))], ids=["mapped", "old", "compressed"])
def test_every_view_is_what_was_saved(write: Callable[[object], bytes], tmp_path: Path) -> None:
    """Guards: offsets and strides into a storage that several tensors share; a compressed archive mapped as if it were plain,
    as torch does: wrong numbers, and no error.
    """
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(write(VIEWS))
    tensors = open_checkpoint([file])
    assert read_whole(tensors) == ([] if write is _saved else [file.name])
    for name, expected in VIEWS.items():
        assert (tensors[name].shape, tensors[name].dtype) == (expected.shape, expected.dtype)
        assert torch.equal(read(tensors[name], tuple((0, length) for length in expected.shape)), expected), name
    assert torch.equal(read(tensors["transposed"], ((1, 3), (2, 8))), MATRIX.t()[1:3, 2:8])


def test_old_files_are_read_one_at_a_time(tmp_path: Path) -> None:
    """Guards: all files of a checkpoint that can't be mapped in memory at once; a tensor of the file before."""
    files = [tmp_path / f"{name}.bin" for name in "ab"]
    for number, file in enumerate(files):
        torch.save({file.stem: torch.full((3,), float(number))}, file, _use_new_zipfile_serialization=False)
    tensors = open_checkpoint(files)
    for name, number in (("a", 0.0), ("b", 1.0), ("a", 0.0)):
        assert read(tensors[name], ((1, 2),)).tolist() == [number]
    for file in files[:1]:
        file.unlink()
    read(tensors["a"], ((0, 1),))  # in memory still
    read(tensors["b"], ((0, 1),))
    with pytest.raises(CheckpointError, match=r"(?s)not a file of torch\.save.*a\.bin"):
        read(tensors["a"], ((0, 1),))


PLAIN, OLD = _saved({"a": MATRIX}), _old({"a": MATRIX})
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "text": (b"hello, world" * 9, "not a file of torch.save"),
    "half": (PLAIN[: len(PLAIN) // 2], "truncated or damaged"),
    "without its end": (PLAIN[:-1], "truncated or damaged"),
    "half of an old one": (OLD[: len(OLD) // 2], "not a file of torch.save, or it is damaged|more than tensors"),
    "old, without its end": (OLD[:-1], "unexpected EOF"),
    "archive": (_compressed(PLAIN)[:0] + PLAIN.replace(b"data.pkl", b"date.pkl"), "not a file of torch.save"),
    "program": (_saved({"a": MATRIX, "b": _Program()}), r"more than tensors.*(posix|nt)\.system.*where you trust it"),
    "program in an old one": (_old({"a": _Program()}), r"more than tensors.*(posix|nt)\.system"),
    "nested": (_saved({"epoch": 3, "model": {"a": MATRIX}}), "'epoch' is no plain tensor.*int"),
    "list": (_saved([MATRIX]), "no model's state dict.*list"),
    "numbered": (_saved({0: MATRIX}), "a name that is int"),
    "sparse": (_saved({"a": torch.eye(3).to_sparse()}), "sparse_coo"),
    "without values": (_saved({"a": torch.ones(2, device="meta")}), "on meta"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Guards: a file that failed to download reported by what the unpickler stumbled over, without its name; a program in a
    checkpoint that is run.
    """
    content, says = BROKEN[case]
    file = tmp_path / "pytorch_model-00002-of-00003.bin"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint([file])
    assert re.search(f"(?s){says}", str(error.value)), str(error.value)
    assert str(file) in str(error.value)
    assert "unpickled" not in capfd.readouterr().out


def test_weights_tied_in_the_file_are_compared_unread(tmp_path: Path) -> None:
    """Guards: an embedding and a head that each rank reads whole to find out that they are one; and two that are not, taken
    for one.
    """
    file = tmp_path / "pytorch_model.bin"
    torch.save({"embed": MATRIX, "head": MATRIX, "copy": MATRIX.clone(), "part": MATRIX[:4], "other": MATRIX[4:]}, file)
    tensors = open_checkpoint([file])
    file.unlink()
    asked: list[str] = []
    real = shardwise.checkpoint.FileSource.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shardwise.checkpoint.FileSource, "read", lambda self, box: (asked.append(self.key), real(self, box))[1])
        assert torch.equal(nn.Parameter(tensors["embed"]).to(torch.bfloat16), tensors["head"].to(torch.bfloat16))
        assert asked == []
        assert torch.equal(tensors["embed"], tensors["copy"])
        assert sorted(asked) == ["copy", "embed"]
        assert not torch.equal(tensors["part"], tensors["other"])
        assert not torch.equal(tensors["embed"] * 2, tensors["head"] * 3)


# --- on two ranks ---


def _split(path: Path, tensors: dict[str, Tensor], **options: bool) -> None:
    """In three files, and an index."""
    names = list(tensors)
    parts = {f"pytorch_model-{n + 1:05}-of-00003.bin": names[n::3] for n in range(3)}
    for file, keys in parts.items():
        torch.save({key: tensors[key] for key in keys}, path / file, **options)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each type: safetensors; one `.bin`; three of them; three of old torch's. What is tied is there by both names."""
    root = tmp_path_factory.mktemp("bins")
    torch.manual_seed(0)
    for kind, sizes in MODELS.items():
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY, **sizes)).save_pretrained(root / kind)
        tensors = load_file(root / kind / "model.safetensors")
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
        for form in ("one", "three", "old"):
            path = root / f"{kind}-{form}"
            shutil.copytree(root / kind, path, ignore=shutil.ignore_patterns("*.safetensors"))
            if form == "one":
                torch.save(tensors, path / "pytorch_model.bin")
            else:
                _split(path, tensors, _use_new_zipfile_serialization=form == "three")
    return root


def _shards(paths: list[str], options: dict) -> list[tuple[dict[str, Tensor], bool]]:
    """On a rank: its parameters, and whether the head is the embedding."""
    found = []
    for path in paths:
        model = shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", **options)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        found.append(({name: parameter.detach() for name, parameter in model.named_parameters()}, tied))
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_shards_are_those_of_safetensors(kind, checkpoints, pool2):
    """Guards: fused, packed and expert weights cut otherwise, tied ones that come apart, another dtype; in one file or several,
    mapped or read whole. Bit for bit: the values are the same.
    """
    paths = [str(checkpoints / name) for name in (kind, *(f"{kind}-{form}" for form in ("one", "three", "old")))]
    for options in ({}, {"dtype": torch.bfloat16}) if kind == "llama" else ({},):
        for (expected, tied), *others in pool2.run(_shards, paths, options):
            assert tied == (kind == "llama")
            for found, also_tied in others:
                assert found.keys() == expected.keys()
                assert also_tied == tied
                assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
                assert {t.dtype for t in found.values()} == {options.get("dtype", torch.float32)}


def _attempt(paths: list[str], options: dict) -> tuple[str, str]:
    try:
        shardwise.AutoModelForCausalLM.from_pretrained(paths[dist.get_rank()], tp_plan="auto", **options)
    except (ShardwiseError, OSError) as error:
        return type(error).__name__, str(error)
    return "loaded", ""


def _edit(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = torch.load(path / "pytorch_model.bin")
        change(tensors)
        torch.save(tensors, path / "pytorch_model.bin")

    return edit


def _cut(path: Path) -> None:
    file = path / "pytorch_model-00002-of-00003.bin"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


UP, W1 = "model.layers.0.mlp.up_proj.weight", "model.layers.0.block_sparse_moe.experts.2.w1.weight"
FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing key": ("llama-one", _edit(lambda t: t.pop(UP)), rf"missing +{UP}: \[48, 32\]"),
    "extra key": ("llama-one", _edit(lambda t: t.update(x=torch.ones(2))), r"unexpected +x \(pytorch_model\.bin\)"),
    "wrong shape of one expert": ("mixtral-one", _edit(lambda t: t.update({W1: torch.ones(44, 32)})), rf"{re.escape(W1)}.*44"),
    "int8": ("llama-one", _edit(lambda t: t.update({UP: t[UP].char()})), rf"dtype +{UP}.*int8"),
    "program": ("llama-one", _edit(lambda t: t.update(x=_Program())), r"pytorch_model\.bin: it holds more than tensors"),
    "truncated file": ("llama-three", _cut, r"pytorch_model-00002-of-00003\.bin: the file is truncated"),
    "truncated old file": ("llama-old", _cut, r"pytorch_model-00002-of-00003\.bin: this is not a file of torch\.save"),
    "lost file": ("llama-three", lambda p: (p / "pytorch_model-00003-of-00003.bin").unlink(), "00003.bin is missing.*index"),
    "asked for": ("llama-one", lambda path: None, r"no checkpoint.*found +pytorch_model\.bin"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault, checkpoints, pool2, tmp_path):
    """Guards: a checkpoint that does not fit and is loaded in silence; a rank that waits for one whose file is broken."""
    kind, change, says = FAULTS[fault]
    path = tmp_path / "changed"
    shutil.copytree(checkpoints / kind, path)
    change(path)
    options = {"use_safetensors": True} if fault == "asked for" else {}
    for name, text in pool2.run(_attempt, [str(path)] * 2, options, timeout=30.0):
        assert name == "CheckpointError"
        assert re.search(f"(?s){says}", text), text
    if fault in ("missing key", "truncated file"):
        first, second = pool2.run(_attempt, [str(checkpoints / kind), str(path)], {}, timeout=30.0)
        assert (first[0], second[0]) == ("MismatchError", "CheckpointError")
        assert "failed on rank 1" in first[1]


# --- adapters ---


def _with_adapter(paths: list[str], folder: Path, broken: Path) -> tuple[Tensor, str]:
    """On a rank: logits with an adapter, and what a file says that the second rank can't read."""
    model = shardwise.AutoModelForCausalLM.from_pretrained(paths[0], tp_plan="auto", dtype=torch.float32)
    model.load_adapter(folder)
    with torch.no_grad():
        logits = model(IDS).logits
    with pytest.raises((MismatchError, RuntimeError, OSError)) as error:
        model.load_adapter(broken if dist.get_rank() else folder, "other")
    return logits, type(error.value).__name__


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
def test_adapters_in_torchs_format(checkpoints, pool2, tmp_path):
    """Guards: an adapter_model.bin that is not found, or that one rank can't read while the other waits for it."""
    base = AutoModelForCausalLM.from_pretrained(checkpoints / "llama-one", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    with torch.no_grad():
        expected = model(IDS).logits
    model.save_pretrained(tmp_path / "good", safe_serialization=False)
    shutil.copytree(tmp_path / "good", tmp_path / "broken")
    file = tmp_path / "broken" / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    results = pool2.run(_with_adapter, [str(checkpoints / "llama-one")], tmp_path / "good", tmp_path / "broken", timeout=30.0)
    assert all((logits - expected).abs().max() < 1e-5 for logits, _ in results)
    assert results[0][1] == "MismatchError" != results[1][1]
