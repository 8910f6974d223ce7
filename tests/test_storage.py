"""Writing checkpoints: the bytes are those of safetensors, the names and the split those of transformers."""

import contextlib
import fcntl
import json
import resource
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import shardwise.storage.writer as storage
from checkpoint_files import OLD, listing, load, refuse, same, save, tiny_llama
from shardwise.errors import CheckpointError
from shardwise.storage import CheckpointWriter, Entry, plan_files

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
]


def some_bytes(dtype, shape):
    """A tensor of random bytes: NaNs and all, nothing may be normalised on the way."""
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def test_bytes_are_those_of_safetensors(tmp_path):
    """Guards: tensors out of safetensors' order, an unpadded header, other escapes in names, wrong bytes for a dtype."""
    tensors = {}
    for dtype in DTYPES:
        word = str(dtype).removeprefix("torch.")
        tensors |= {f"z.{word}": some_bytes(dtype, (3, 5)), f"a.{word}.empty": some_bytes(dtype, (2, 0, 3))}
        if dtype != torch.float4_e2m1fn_x2:
            tensors[f"m.{word}.scalar"] = some_bytes(dtype, ())
    for name in ('quote"back\\slash', "tab\tnew\nline\x01\x1f\x7f\b\f", "umlaut-ü-日本-\u2028-\U0001f600", "", "/"):
        tensors[name] = torch.rand(3)
    save(tmp_path, tensors)
    assert (tmp_path / "model.safetensors").read_bytes() == safetensors.torch.save(tensors, metadata={"format": "pt"})


@pytest.mark.parametrize("length", range(8))
def test_header_padding(tmp_path, length):
    """Guards: padding right for one header length only (0 and 8 spaces are the traps)."""
    tensors = {"x" * (length + 1): torch.zeros(1, dtype=torch.uint8)}
    save(tmp_path, tensors, metadata={})
    assert (tmp_path / "model.safetensors").read_bytes() == safetensors.torch.save(tensors, metadata={})


def test_strides_and_chunks(tmp_path, monkeypatch):
    """Guards: the memory of a view written as it lies, a piece lost or doubled between chunks, a lazy conjugation ignored."""
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 40)
    base = torch.rand(6, 7, 5)
    views = {
        "transposed": base.transpose(0, 2),
        "strided": base[::2, 1:, ::3],
        "expanded": base[0, 0].expand(9, 5),
        "offset": base[1],
        "conjugated": torch.rand(4, 3, dtype=torch.complex64).conj(),
        "negated": torch._neg_view(torch.rand(4)),
        "float8": base.to(torch.float8_e4m3fn).transpose(0, 1),
        "grad": torch.nn.Parameter(base),
        "long": torch.rand(1000),
    }
    save(tmp_path, views)
    expected = {name: view.detach().resolve_conj().resolve_neg().contiguous().clone() for name, view in views.items()}
    assert (tmp_path / "model.safetensors").read_bytes() == safetensors.torch.save(expected, metadata={"format": "pt"})


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["50GB", "30KB", 20_000])
def test_directory_is_that_of_transformers(tmp_path, variant, max_shard_size):
    """Guards: another split, other names (a variant goes before a shard's number), another index than save_pretrained's."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size, variant=variant)
    theirs = listing(tmp_path / "theirs")
    configs = {name: theirs[name] for name in ("config.json", "generation_config.json")}
    options = {"max_shard_size": max_shard_size, "variant": variant, "total_parameters": model.num_parameters()}
    save(tmp_path / "ours", model.state_dict(), configs, **options)
    assert listing(tmp_path / "ours") == theirs
    assert len(theirs) == 3 if max_shard_size == "50GB" else len(theirs) > 5
    save(tmp_path / "ours", model.state_dict(), configs, **options)  # over itself: the same names again
    assert listing(tmp_path / "ours") == theirs


def test_index_without_a_given_count(tmp_path):
    """Guards: bytes taken for parameters, or 4-byte ones assumed."""
    save(tmp_path, {"a": torch.zeros(10, dtype=torch.bfloat16), "b": torch.zeros(3, 2)}, max_shard_size=20)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 16, "total_size": 44}


PEAK = """
import sys, resource, torch
from shardwise.storage import CheckpointWriter, Entry, plan_files
side, count = 2048, 12
plan = plan_files([Entry(f"t{i:02}", torch.float32, (side, side)) for i in range(count)])
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with CheckpointWriter(sys.argv[1], plan) as writer:
    for entry in plan.entries:
        writer.write(entry, torch.ones(side, side).T)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / (side * side * 4 / 1024))
"""


def test_peak_memory_is_one_tensor(tmp_path):
    """Guards: a file collected in memory. 12 tensors would be 12; one and its transposed copy (under a chunk here) are 2."""
    result = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 4


def test_exception_in_the_block(tmp_path):
    """Guards: half a checkpoint published because the block was left."""
    save(tmp_path, OLD)
    before = listing(tmp_path)
    plan = plan_files([Entry("a", torch.float32, (2,)), Entry("b", torch.float32, (2,))])
    with contextlib.suppress(ZeroDivisionError), CheckpointWriter(tmp_path, plan) as writer:
        writer.write(plan.entries[0], torch.zeros(2))
        raise ZeroDivisionError
    assert listing(tmp_path) == before


def test_full_disk(tmp_path):
    """Guards: a short write taken for a whole one, a raw OSError, the earlier checkpoint gone."""
    save(tmp_path, OLD)
    before = listing(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        with pytest.raises(CheckpointError, match="cannot be saved") as caught:
            save(tmp_path, {"big": torch.zeros(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "4,194,304 bytes of tensors to write" in str(caught.value)
    assert listing(tmp_path) == before


def test_a_failed_write_can_be_tried_again(tmp_path, monkeypatch):
    """Guards: the second attempt appended to what the first one left in the file."""
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 64)
    tensors = {"a": torch.rand(100), "b": torch.rand(100)}
    plan = plan_files([Entry(name, torch.float32, (100,)) for name in tensors])
    with CheckpointWriter(tmp_path, plan) as writer:
        writer.write(plan.entries[0], tensors["a"])
        whole, calls = storage._write_all, iter(range(100))
        monkeypatch.setattr(storage, "_write_all", lambda *a: refuse() if next(calls) == 3 else whole(*a))
        with pytest.raises(CheckpointError):
            writer.write(plan.entries[1], tensors["b"])
        writer.write(plan.entries[1], tensors["b"])
    assert (tmp_path / "model.safetensors").read_bytes() == safetensors.torch.save(tensors, metadata={"format": "pt"})


def test_directories_that_cannot_be_written(tmp_path, monkeypatch):
    """Guards: a raw OSError without a way out, or (as transformers does) a log line and no checkpoint."""
    (tmp_path / "file").write_text("mine")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
        with pytest.raises(CheckpointError, match="cannot be saved"):
            save(bad, OLD)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "read-only").mkdir()
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(tmp_path / "read-only", OLD)


def test_filesystem_without_locks(tmp_path, monkeypatch):
    """Guards: network filesystems that refuse to lock a directory made unusable."""
    monkeypatch.setattr(fcntl, "flock", refuse)
    save(tmp_path, OLD)
    assert same(load(tmp_path), OLD)


def test_tensors_that_are_not_the_planned_ones(tmp_path):
    """Guards: bytes of another dtype or shape, or of a tensor without data, under a header that says otherwise."""
    plan = plan_files([Entry("w", torch.float32, (2, 3))])
    with contextlib.suppress(CheckpointError), CheckpointWriter(tmp_path, plan) as writer:
        for wrong, words in [
            (torch.zeros(3, 2), r"w: .*\n.*float32 \(3, 2\)\n.*float32 \(2, 3\)"),
            (torch.zeros(2, 3, dtype=torch.int32), r"int32 \(2, 3\)"),
            (torch.zeros(2, 3, device="meta"), "meta"),
        ]:
            with pytest.raises(CheckpointError, match=words):
                writer.write(plan.entries[0], wrong)
    assert not listing(tmp_path)


def test_rows_of_a_tensor(tmp_path):
    """Guards: rows left out, written twice or behind the end; a failed attempt that leaves its bytes in the file."""
    tensors = {"a": torch.arange(30.0).view(10, 3), "b": torch.zeros(0, 3), "c": torch.tensor(7.0), "d": torch.arange(4)}
    plan = plan_files([Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
    with CheckpointWriter(tmp_path, plan) as writer:
        for entry in plan.entries:
            tensor = tensors[entry.name]
            if entry.name != "a":
                writer.write(entry, tensor)
                continue
            writer.write(entry, torch.full((4, 3), 9.0))
            for start, rows in ((3, tensor[3:]), (5, tensor[5:]), (4, torch.zeros(7, 3)), (4, torch.zeros(6, 2))):
                with pytest.raises(CheckpointError, match=r"a: not the tensor that was planned\..*\n.*\n.*from row 4 on"):
                    writer.write(entry, rows, start)
            writer.write(entry, tensor[:2])  # once more from the beginning
            writer.write(entry, tensor[2:9], 2)
            with pytest.raises(CheckpointError, match="is not the tensor to be written now"):
                writer.write(next(e for e in plan.entries if e.name == "b"), tensors["b"])
            writer.write(entry, tensor[9:], 9)
    save(tmp_path / "whole", tensors)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_order_and_completeness(tmp_path):
    """Guards: a tensor under the name of another, one written twice, one forgotten."""
    plan = plan_files([Entry(name, torch.float32, (2,)) for name in "abc"], max_shard_size=8)
    a, b, c = plan.entries
    with pytest.raises(CheckpointError, match=r"2 of 3 tensors were not written(.|\n)*b: float32"):
        write_two_wrongly(tmp_path, plan)
    assert not listing(tmp_path)
    with CheckpointWriter(tmp_path, plan) as writer:
        for entry in (a, b, c):
            writer.write(entry, torch.zeros(2))
        with pytest.raises(CheckpointError, match="nothing more"):
            writer.write(c, torch.zeros(2))
    with pytest.raises(CheckpointError, match="not open"):
        writer.write(a, torch.zeros(2))


def write_two_wrongly(directory, plan):
    """Only `a` gets through."""
    a, b, _ = plan.entries
    with CheckpointWriter(directory, plan) as writer:
        with pytest.raises(CheckpointError, match=r"b is not the tensor(.|\n)*a: float32"):
            writer.write(b, torch.zeros(2))
        writer.write(a, torch.zeros(2))
        with pytest.raises(CheckpointError, match="a is not the tensor"):
            writer.write(a, torch.zeros(2))


def test_what_cannot_be_planned():
    """Guards: a name that silently wins over another, a header no reader understands, an empty file."""
    with pytest.raises(ValueError, match="a: two tensors"):
        plan_files([Entry("a", torch.float32, (1,)), Entry("a", torch.float16, (1,))])
    with pytest.raises(ValueError, match="no tensors"):
        plan_files([])
    with pytest.raises(ValueError, match="Unit"):
        plan_files([Entry("a", torch.float32, (1,))], max_shard_size="5XB")
    with pytest.raises(ValueError, match="variant"):
        plan_files([Entry("a", torch.float32, (1,))], variant="../up")
    for bad in (
        Entry("a", torch.complex128, (1,)),
        Entry("__metadata__", torch.float32, (1,)),
        Entry("\ud800", torch.float32, (1,)),
    ):
        with pytest.raises(CheckpointError, match="cannot store 1 of 2"):
            plan_files([Entry("fine", torch.float32, (1,)), bad])


@pytest.mark.parametrize(
    "name", ["../config.json", "a/b", "", ".hidden", "model.safetensors", "model-00001-of-00002.safetensors"]
)
def test_files_that_cannot_be_added(tmp_path, name):
    """Guards: a file outside the directory, or one in the place of the weights."""
    plan = plan_files([Entry("a", torch.float32, (1,))])
    with CheckpointWriter(tmp_path, plan) as writer:
        writer.write(plan.entries[0], torch.zeros(1))
        with pytest.raises(ValueError, match="add_file"):
            writer.add_file(name, b"")
