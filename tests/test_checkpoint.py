"""Checkpoints: their files, found and opened without reading a weight."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardwise.checkpoint import find_checkpoint, open_checkpoint
from shardwise.errors import CheckpointError
from shardwise.lazy import read_into, sources

HEADER = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
GOOD = len(HEADER).to_bytes(8, "little") + HEADER + bytes(24)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"abc", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (GOOD[:30], "truncated"),
        (GOOD[:-1], "truncated; a is not all there"),
        (b"\x08" + bytes(7) + b"no json!", "header can't be read"),
        (b"\x08" + bytes(7) + b"[1, 2,3]", "header can't be read"),
        (GOOD.replace(b"[2,3]", b"[2,4]"), "not a safetensors file"),
        (GOOD.replace(b"F32", b"F99"), "not a safetensors file"),
    ],
)
def test_broken_files_are_named(content: bytes | None, says: str, tmp_path: Path) -> None:
    """Guards: a file that failed to download reported without its name, or when its weights are read, or never."""
    file = tmp_path / "model-00002.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"(?s){re.escape(says)}.*{re.escape(str(file))}|{re.escape(str(file))}.*{says}"):
        open_checkpoint([file])


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "not a readable checkpoint index"),
        ("[]", "not a readable checkpoint index"),
        ({"a": "1.safetensors", "b": "3.safetensors"}, "3.safetensors is missing"),
        ({"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}, "c: not in 2.safetensors"),
        ({"a": "2.safetensors", "b": "2.safetensors", "x": "1.safetensors"}, "a: not in 2.safetensors"),
        ({"a": "1.safetensors", "x": "2.safetensors"}, "b: in 2.safetensors, not in the index"),
        ({"a": "../1.safetensors"}, "outside of the checkpoint"),
    ],
)
def test_an_index_that_disagrees_is_refused(index: str | dict[str, str], says: str, tmp_path: Path) -> None:
    """Guards: half a checkpoint loaded, with the rest initialised at random."""
    for number, key in enumerate("ab", 1):
        save_file({key: torch.ones(2)}, tmp_path / f"{number}.safetensors")
    text = index if isinstance(index, str) else json.dumps({"weight_map": index})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(says)):
        open_checkpoint(*(lambda found: (found.files, found.index))(find_checkpoint(tmp_path)))


def test_a_key_in_two_files_is_refused(tmp_path: Path) -> None:
    """Guards: leftovers of an earlier save in the same directory that win over the new weights."""
    for name in ("new", "old"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)a is in two files.*new\.safetensors.*old\.safetensors"):
        open_checkpoint([tmp_path / "new.safetensors", tmp_path / "old.safetensors"])


def test_checkpoints_that_are_not_there(tmp_path: Path) -> None:
    """Guards: a directory of nothing, or of the other format alone, reported as a missing key or a broken file."""
    with pytest.raises(CheckpointError, match=r"there is no checkpoint.*\n.*pytorch_model\.bin"):
        find_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint.*found +pytorch_model\.bin.*leave use_safetensors out"):
        find_checkpoint(tmp_path, use_safetensors=True)
    with pytest.raises(CheckpointError, match="no checkpoint in part"):
        find_checkpoint(tmp_path, subfolder="part")
    with pytest.raises(CheckpointError, match="neither a directory nor a model"):
        find_checkpoint(str(tmp_path / "lost"))


def test_the_format_of_two_is_that_of_transformers(tmp_path: Path) -> None:
    """Guards: old `.bin` files beside newer safetensors that are loaded in their place, or ones asked for that aren't."""
    index = '{"weight_map": {"a": "1.bin"}}'
    names = ["pytorch_model.bin.index.json", "pytorch_model.bin", "model.safetensors.index.json", "model.safetensors"]
    (tmp_path / "1.bin").touch()
    for name in names:  # from the one that comes last
        (tmp_path / name).write_text(index)
        expected = tmp_path / ("1.bin" if name.endswith(".json") else name)
        assert find_checkpoint(tmp_path).files == (expected,)
    assert find_checkpoint(tmp_path, use_safetensors=True).files == (tmp_path / "model.safetensors",)
    assert find_checkpoint(tmp_path, use_safetensors=False).files == (tmp_path / "pytorch_model.bin",)


def test_revision_subfolder_and_variant(tmp_path: Path) -> None:
    """Guards: the main revision, the top folder or the default variant loaded in place of what was asked for."""
    commit = "0" * 40
    folder = tmp_path / "models--me--model" / "snapshots" / commit / "part"
    folder.mkdir(parents=True)
    (tmp_path / "models--me--model" / "refs").mkdir()
    (tmp_path / "models--me--model" / "refs" / "v2").write_text(commit)
    save_file({"a": torch.ones(2)}, folder / "model.fp16.safetensors")
    options = {"cache_dir": tmp_path, "local_files_only": True}
    found = find_checkpoint("me/model", subfolder="part", revision="v2", variant="fp16", **options)
    assert found.files == (folder / "model.fp16.safetensors",)
    for other in ({"subfolder": "part", "revision": "v2"}, {"revision": "v2", "variant": "fp16"}, {"subfolder": "part"}):
        with pytest.raises(CheckpointError, match="no checkpoint"):
            find_checkpoint("me/model", **options, **other)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_box_of_a_big_file_takes_its_own_memory_only(tmp_path: Path) -> None:
    """Guards: a tensor read whole for a box of it (64 MiB against 1), or left inside the file's mapping."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4096, 4096)}, file)
    tensor = open_checkpoint([file])["a"]
    out = torch.ones(4096, 64)  # allocated and touched before
    before = _anonymous()
    read_into(out, tensor, ((0, 4096), (64, 128)))
    mapped = sources(tensor)[0].read(((0, 4096), (0, 4096)))
    assert out.sum() == 0
    assert _anonymous() - before < 4 << 20
    assert not mapped.data_ptr() <= out.data_ptr() < mapped.data_ptr() + mapped.nbytes


def _anonymous() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"^Anonymous: +(\d+)", text, re.M)[1])
