"""What the tests of `storage` and of `publish` share: saving a dict of tensors, and loading by transformers' rules."""

import json
from pathlib import Path

import safetensors.torch
import torch
import transformers

from shardwise.storage import CheckpointWriter, Entry, Names, plan_files

OLD = {f"t{i}": torch.full((3, i + 1), 1.0) for i in range(4)} | {"only.old": torch.ones(2)}
NEW = {f"t{i}": torch.full((3, i + 1), 2.0) for i in range(4)} | {"only.new": torch.ones(3)}
ONE, THREE, FIVE = 10_000, 50, 1  # max_shard_size that makes so many files


def save(directory, tensors, files=(), **options):
    """The whole way: plan, write in the plan's order, publish."""
    writer_options = {name: options.pop(name) for name in ("metadata", "total_parameters") if name in options}
    plan = plan_files([Entry(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], **options)
    with CheckpointWriter(directory, plan, **writer_options) as writer:
        for entry in plan.entries:
            writer.write(entry, tensors[entry.name])
        for name, data in dict(files).items():
            writer.add_file(name, data)
    return plan


def load(directory, variant=None):
    """By transformers' rules: the single file where there is one, else what the index says. None where there is neither."""
    names = Names(variant)
    if (directory / names.weights).is_file():
        return safetensors.torch.load_file(directory / names.weights)
    if not (directory / names.index).is_file():
        return None
    weight_map = json.loads((directory / names.index).read_text())["weight_map"]
    files = {file: safetensors.torch.load_file(directory / file) for file in set(weight_map.values())}
    assert {name for tensors in files.values() for name in tensors} == set(weight_map)
    return {name: files[file][name] for name, file in weight_map.items()}


def same(first, second):
    """Whether two dicts of tensors hold the same."""
    return first is not None and first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def listing(directory):
    """Name -> bytes of all files; there must be no directory."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def files_of(directory):
    """Name -> bytes of all files."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def tiny_llama():
    """A random model of 100 KB."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def refuse(*arguments, **options):
    """In the place of a call that the filesystem does not have."""
    raise OSError(95, "not supported")
