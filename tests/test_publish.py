"""Crashes at every point of a save: what a loader finds afterwards is the old checkpoint or the new one."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import transformers

from checkpoint_files import FIVE, NEW, OLD, ONE, THREE, files_of, listing, load, refuse, same, save, tiny_llama
from shardwise.errors import CheckpointError

UNRELATED = {"README.md": b"mine", "tokenizer.json": b"{}", "model.bf16-00001-of-00002.safetensors": b"another variant"}
CALLS = ("replace", "unlink", "link", "fsync", "rename", "mkdir", "rmdir")


class Killed(BaseException):
    """Stands for the end of the process: nothing that comes after it changes the disk."""


class Disturbed:
    """Lets the filesystem calls go wrong at the `at`-th.

    "killed": neither it nor any later one happens. "fails": it raises OSError, later ones work.
    "interrupted": it happens, and Ctrl-C arrives right after it.
    """

    def __init__(self, monkeypatch, how, at):
        self.how, self.at, self.count = how, at, 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, call):
        def disturbed(*arguments, **options):
            self.count += 1
            if self.how == "killed" and self.count >= self.at:
                raise Killed
            if self.how == "fails" and self.count == self.at:
                raise OSError(5, "Input/output error")
            result = call(*arguments, **options)
            if self.how == "interrupted" and self.count == self.at:
                raise KeyboardInterrupt
            return result

        return disturbed


def prepare(directory, earlier):
    """Make a directory with unrelated files and an earlier checkpoint."""
    directory.mkdir()
    for name, data in UNRELATED.items():
        (directory / name).write_bytes(data)
    if earlier == "one and an index":  # what a crash on the way from one file to several leaves
        save(directory, NEW, {"config.json": b"old"}, max_shard_size=THREE)
        safetensors.torch.save_file(OLD, directory / "model.safetensors")
    elif earlier is not None:
        save(directory, OLD, {"config.json": b"old"}, max_shard_size=earlier)


@pytest.mark.parametrize("how", ["killed", "fails", "interrupted"])
@pytest.mark.parametrize("size", [ONE, THREE, FIVE])
@pytest.mark.parametrize("earlier", [None, ONE, THREE, FIVE, "one and an index"])
def test_every_crash_leaves_the_old_or_the_new(tmp_path, monkeypatch, earlier, size, how):
    """Guards: shards overwritten while the old index refers to them, the flip before the shards, an old single file that hides
    the new index, new shards removed after the flip, leftovers that stay for ever. At each filesystem call in turn."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # counted below, but thousands of real ones would take minutes
    new_files = {"config.json": b"new", "generation_config.json": b"new"}
    save(tmp_path / "fresh", NEW, new_files, max_shard_size=size)
    expected = listing(tmp_path / "fresh") | UNRELATED
    seen = set()
    for at in range(1, 200):
        directory = tmp_path / str(at)
        prepare(directory, earlier)
        before = listing(directory)
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            disturbed = Disturbed(patch, how, at)
            raised = None
            try:
                save(directory, NEW, new_files, max_shard_size=size)
            except (Killed, KeyboardInterrupt, CheckpointError) as error:
                raised = error
        found = load(directory)
        is_new = same(found, NEW)
        assert is_new or (found is None if earlier is None else same(found, OLD))
        seen.add(is_new)
        assert all((directory / name).read_bytes() == data for name, data in UNRELATED.items())
        if how != "killed":
            # A process that lives on leaves no new config beside old weights, and no shards that nothing refers to.
            left = {name: data for name, data in files_of(directory).items() if is_new or name not in before}
            assert is_new or (left == {} and files_of(directory) == before)
            assert not is_new or (directory / "config.json").read_bytes() == b"new"
        assert is_new or raised is not None
        assert raised is None or not isinstance(raised, CheckpointError) or not is_new
        save(directory, NEW, new_files, max_shard_size=size)
        assert listing(directory) == expected
        if disturbed.count < at:
            break
    assert seen == {True, False}
    assert raised is None


def test_old_tensors_in_use_survive(tmp_path):
    """Guards: files overwritten in place. Tensors still mapped from the old ones would change."""
    for size in (ONE, FIVE):
        save(tmp_path, OLD, max_shard_size=size)
        mapped = load(tmp_path)
        save(tmp_path, NEW, max_shard_size=size)
        assert same(mapped, OLD)
        assert same(load(tmp_path), NEW)


def test_nothing_is_published_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """Guards: a rename that survives a power cut while the bytes of the file do not; the flip before the shards' names."""
    events = []

    def spy(name, call, target):
        def wrapped(*arguments):
            events.append((name, target(arguments)))
            return call(*arguments)

        monkeypatch.setattr(os, name, wrapped)

    save(tmp_path, OLD, {"config.json": b"old"}, max_shard_size=FIVE)
    spy("fsync", os.fsync, lambda arguments: Path(os.readlink(f"/proc/self/fd/{arguments[0]}")))
    spy("replace", os.replace, lambda arguments: arguments)
    save(tmp_path, NEW, {"config.json": b"new"}, max_shard_size=FIVE)
    moves = [(at, *event[1]) for at, event in enumerate(events) if event[0] == "replace"]
    assert len(moves) == 5 + 2 + 1  # shards, config and index, the index with the ordinary names
    for at, source, _ in moves:
        assert ("fsync", source) in events[:at]
    flip = next(at for at, _, target in moves if target.name.endswith("index.json"))
    assert events[flip - 1] == ("fsync", tmp_path)


WORKER = """
import sys, torch
from shardwise.storage import CheckpointWriter, Entry, plan_files
plan = plan_files([Entry(f"t{i}", torch.float32, (64,)) for i in range(4)], max_shard_size=512)
with CheckpointWriter(sys.argv[1], plan) as writer:
    for entry in plan.entries[:3]:
        writer.write(entry, torch.zeros(64))
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_sigkill_while_writing(tmp_path):
    """Guards: a save that is visible before it is complete, a lock or staging directory that stays for ever."""
    save(tmp_path, OLD, max_shard_size=THREE)
    before = listing(tmp_path)
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.readline() == "ready\n"
        with pytest.raises(CheckpointError, match="another process"):
            save(tmp_path, NEW)
        worker.send_signal(signal.SIGKILL)
    (leftover,) = tmp_path.glob(".shardwise-save-*")
    assert list(leftover.iterdir())
    assert files_of(tmp_path) == before
    save(tmp_path, NEW)
    assert set(listing(tmp_path)) == {"model.safetensors"}


def test_transformers_loads_shards_under_free_names(tmp_path, monkeypatch):
    """Guards: names that transformers cannot load, or would not clean away, on a filesystem without hard links."""
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    monkeypatch.setattr(os, "link", refuse)
    changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save(tmp_path, changed, max_shard_size="30KB")
    shards = {name for name in listing(tmp_path) if name.endswith(".safetensors")}
    assert all(name.startswith("model-2-") for name in shards)
    assert same(transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict(), changed)
    save(tmp_path, changed, max_shard_size="30KB")
    assert {name.replace("model-2-", "model-") for name in shards} == {
        n for n in listing(tmp_path) if n.endswith(".safetensors")
    }
    save(tmp_path, changed, max_shard_size="30KB")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not [name for name in listing(tmp_path) if name.startswith("model-2-")]
