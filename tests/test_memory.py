"""What loading and saving take: memory on each rank, and bytes of the checkpoint. About 160 MiB, on two processes.

Anonymous memory only: pages of a mapped file are the system's to drop.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import shardwise
from shardwise.checkpoint import FileSource
from shardwise.model_state import required_state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MIB = 2**20
SLACK = 64 * MIB
LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "vocab_size": 8000}
MIXTRAL = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 2, "vocab_size": 2000, "num_local_experts": 8}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Of the largest tensor that is put together from several: a layer's gate and up matrices of all experts, in float32.
CONVERSION = {"llama": 0, "tied .bin": 0, "mixtral": 8 * 2 * 1792 * 512 * 4}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One of each type, float32."""
    root = tmp_path_factory.mktemp("large")
    for kind, sizes in (("llama", LLAMA), ("mixtral", MIXTRAL)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **HEADS, **sizes))
        model = model.to_empty(device="cpu")
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.fill_(number / 100)
        model.save_pretrained(root / kind)
        if kind == "llama":
            _tie_in_one_bin(root / kind, root / "tied .bin")
    return {path.name: str(path) for path in root.iterdir()}


def _tie_in_one_bin(path: Path, other: Path) -> None:
    """The same weights in torch's format, the embedding and the head one tensor by two names."""
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    other.mkdir()
    torch.save(tensors, other / "pytorch_model.bin")
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (other / "config.json").write_text(json.dumps(config))


def anonymous() -> int:
    """Bytes of anonymous memory that this process has now."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most that anonymous memory grows in the block, into the list; looked up a thousand times a second."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # else what was freed before would not count
    if trim is not None:
        trim(0)
    start, over, found = anonymous(), threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.001):
            found[0] = max(found[0], anonymous() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        found[0] = max(found[0], anonymous() - start)


def _warm_up(path: str) -> None:
    """Whatever is imported or allocated once."""
    config = AutoConfig.from_pretrained(path, num_hidden_layers=1, hidden_size=64, intermediate_size=64, vocab_size=32)
    torch.manual_seed(0)
    shardwise.parallelize(AutoModelForCausalLM.from_config(config))


def _load(path: str) -> tuple[int, int, int, int]:
    """Peak, bytes of this rank's tensors, bytes of those that are in the checkpoint, bytes asked of its file."""
    _warm_up(path)
    asked, real = [0], FileSource.read

    def read(self: FileSource, box: tuple[tuple[int, int], ...]) -> Tensor:
        asked[0] += prod(stop - start for start, stop in box) * self.dtype.itemsize
        return real(self, box)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSource, "read", read)
        with peak() as found:
            model = shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.float32)
    plan = required_state(model).plan
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(row.local_bytes(torch.distributed.get_rank(), 2) for row in plan if row.name in model.state_dict())
    return found[0], held, stored, asked[0]


@pytest.mark.parametrize("kind", ["llama", "mixtral", "tied .bin"])
def test_loading(kind, checkpoints, pool2):
    """Guards: a rank that reads or holds more than its part: the whole checkpoint, all experts of a layer, or copies.

    What is tied is compared without being read. Both ranks together ask for the checkpoint once, and for what is replicated
    twice.
    """
    (file,) = (*Path(checkpoints[kind]).glob("*.safetensors"), *Path(checkpoints[kind]).glob("*.bin"))
    size = file.stat().st_size
    assert size > 120 * MIB
    for grown, held, stored, asked in pool2.run(_load, checkpoints[kind]):
        assert 0.45 * size < held < 0.55 * size
        assert asked == stored
        assert grown <= held + CONVERSION[kind] + SLACK, f"{grown / MIB:.0f} MiB, {held / MIB:.0f} MiB of shards"
        assert grown >= 0.8 * held  # the measure sees what there is


def _clones(path: str) -> int:
    """The defect: all of the file in memory, then the part of it."""
    with peak() as found:
        whole = {key: tensor.clone() for key, tensor in load_file(Path(path, "model.safetensors")).items()}
        parts = {key: tensor[: len(tensor) // 2].clone() for key, tensor in whole.items()}
        del whole, parts
    return found[0]


def test_the_measure_bites(checkpoints, pool2):
    """Guards: a bound that loading all of it first, and then slicing, would keep; and a peak that nobody looked at."""
    size = Path(checkpoints["llama"], "model.safetensors").stat().st_size
    assert min(pool2.run(_clones, checkpoints["llama"])) > size / 2 + CONVERSION["llama"] + SLACK


def _save(path: str, target: str) -> tuple[int, int]:
    model = shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.float32)
    with peak() as found:
        model.save_pretrained(target)
    return found[0], max(row.bytes for row in required_state(model).plan)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_saving(kind, checkpoints, pool2, tmp_path):
    """Guards: a rank that gathers more than one full tensor before it is written."""
    for grown, largest in pool2.run(_save, checkpoints[kind], str(tmp_path)):
        assert grown <= largest + SLACK, f"{grown / MIB:.0f} MiB, {largest / MIB:.0f} MiB the largest tensor"
    written, read = Path(tmp_path, "model.safetensors"), Path(checkpoints[kind], "model.safetensors")
    assert written.stat().st_size == read.stat().st_size
    assert written.read_bytes() == read.read_bytes()
