"""A parallel model is the transformers model it was: it is copied, pickled, undone, wrapped, checkpointed and stepped like
any other.
"""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaForCausalLM

import shardwise
from figures import gradient_error, gradients
from models import TYPES, batches, build, checkpoint
from on_ranks import load, logits, plain_gradients, world

# --- several models ---


def interleave(neighbours: Path, everyone: Path, across: Path) -> list[dict[str, Tensor] | None]:
    """On four ranks: a model on 0, 1 and on 2, 3; one on all; one on 0, 2 and on 1, 3. All forwards come before any
    backward.
    """
    crossed = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("pair", "tp"))["tp"]
    meshes = (world("pair", "tp", shape=(2, 2))["tp"], world("tp"), crossed)
    models = [load(path, mesh) for path, mesh in zip((neighbours, everyone, across), meshes, strict=True)]
    losses = [batch.loss(model) for model, batch in zip(models, batches(), strict=True)]
    for i in (1, 2, 0):
        losses[i].backward()
    return [gradients(model) for model in models]


def test_models_on_different_meshes_at_once(pool4, tmp_path_factory):
    """Guards: a process group, a memo of the input copy or a size kept for the process, which the last model made
    overwrites.
    """
    names = ("llama", "qwen3", "mixtral")
    ranks = pool4.run(interleave, *(checkpoint(tmp_path_factory, name) for name in names))
    for model, (name, batch, first_ranks) in enumerate(zip(names, batches(), ([0, 2], [0], [0, 1]), strict=True)):
        assert [rank for rank in range(4) if ranks[rank][model] is not None] == first_ranks
        for rank in first_ranks:
            assert gradient_error(ranks[rank][model], plain_gradients(name, batch)) < 1e-3


def different_models(*paths: Path) -> dict[str, Tensor] | None:
    """On four ranks: each pair its own model."""
    mesh = world("pair", "tp", shape=(2, 2))
    model = load(paths[mesh.get_coordinate()[0]], mesh["tp"])
    batches()[0].loss(model).backward()
    return gradients(model)


def test_different_models_on_parts_of_the_world(pool4, tmp_path_factory):
    """Guards: a collective over all processes where one over the mesh is meant: the pairs make different calls, and would
    hang.
    """
    names = ("llama", "phi3")
    ranks = pool4.run(different_models, *(checkpoint(tmp_path_factory, name) for name in names))
    for rank, name in ((0, "llama"), (2, "phi3")):
        assert gradient_error(ranks[rank], plain_gradients(name, batches()[0])) < 1e-3


# --- copies ---


def copies(path: Path) -> None:
    """On a rank: a copy that is zeroed, and one that is trained."""
    model = load(path)
    before, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    zeroed, trained = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in zeroed.parameters():
            parameter.zero_()
    assert logits(zeroed).abs().max() == 0
    assert torch.equal(logits(trained), before)
    batches()[0].loss(trained).backward()
    assert all(p.grad is not None for p in trained.parameters())
    assert all(p.grad is None for p in model.parameters())
    torch.optim.SGD(trained.parameters(), lr=0.1).step()
    assert not torch.equal(logits(trained), before)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_deepcopy_computes_with_its_own_weights(name, pool2, tmp_path_factory):
    """Guards: a forward that is a closure over the original module: the copy then silently runs the original's weights."""
    pool2.run(copies, checkpoint(tmp_path_factory, name))


def save_and_load_whole(path: Path) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
    """On a rank: the gradients of a model, and of what torch.save and torch.load make of it."""
    model = load(path)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
    assert repr(loaded) == repr(model)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    for each in (model, loaded):
        batches()[0].loss(each).backward()
    return gradients(model), gradients(loaded)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_torch_save_and_load(name, pool2, tmp_path_factory):
    """Guards: classes made at run time that pickle does not find again, a mesh that does not survive, a second class for
    the same style.
    """
    before, after = pool2.run(save_and_load_whole, checkpoint(tmp_path_factory, name))[0]
    assert gradient_error(after, before) == 0


# --- there and back ---


def round_trip(name: str, saved: Path) -> Tensor:
    """On a rank: parallelize and unparallelize."""
    model = build(name)
    expected = logits(model)  # the first forward installs transformers' hooks: attributes that are not ours
    before, config = snapshot(model), copy.deepcopy(model.config)
    shardwise.parallelize(model, world("tp"))
    assert snapshot(model).keys() == before.keys()
    assert shardwise.unparallelize(model) is model
    assert changes(before, snapshot(model)) == []
    assert model.config.to_dict() == config.to_dict()
    if dist.get_rank() == 0:
        model.save_pretrained(saved)
    assert torch.equal(logits(model), expected)
    return model.eval().generate(batches()[0].input_ids, max_new_tokens=4, do_sample=False)


def snapshot(model: nn.Module) -> dict[str, tuple[type, dict[str, object], dict[str, Tensor]]]:
    """Class, own attributes and values of every module, by name."""
    inner = {"_parameters", "_buffers", "_modules"}
    return {
        name: (
            type(module),
            {key: value for key, value in vars(module).items() if key not in inner},
            {
                key: tensor.clone()
                for key, tensor in (*module._parameters.items(), *module._buffers.items())
                if tensor is not None
            },
        )
        for name, module in model.named_modules()
    }


def changes(before: dict, after: dict) -> list[str]:
    """What differs between two snapshots, in words."""
    found = [f"module {name}" for name in before.keys() ^ after.keys()]
    for name in before.keys() & after.keys():
        (kind, attributes, tensors), (other_kind, other_attributes, other_tensors) = before[name], after[name]
        found += [f"{name}: {other_kind}"] if kind is not other_kind else []
        found += [f"{name}.{key}" for key in attributes.keys() ^ other_attributes.keys()]
        found += [
            f"{name}.{key}"
            for key in attributes.keys() & other_attributes.keys()
            if attributes[key] is not other_attributes[key] and attributes[key] != other_attributes[key]
        ]
        found += [f"{name}.{key}" for key in tensors.keys() ^ other_tensors.keys()]
        found += [
            f"{name}.{key}"
            for key in tensors.keys() & other_tensors.keys()
            if not torch.equal(tensors[key], other_tensors[key])
        ]
    return found


@pytest.mark.parametrize("name", TYPES)
def test_unparallelize_undoes_parallelize(name, pool2, tmp_path_factory):
    """Guards: a class, an attribute (a local number of heads), a tie or a bit that does not come back; a model that then
    runs on, but on the wrong shapes, or saves shards.
    """
    saved, reference = tmp_path_factory.mktemp("undone") / name, build(name)
    path = checkpoint(tmp_path_factory, name)
    expected = reference.eval().generate(batches()[0].input_ids, max_new_tokens=4, do_sample=False)
    for actual in pool2.run(round_trip, name, saved):
        assert torch.equal(actual, expected)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == {f.name: f.read_bytes() for f in path.iterdir()}


def twice(path: Path) -> None:
    """On a rank: parallelize what is parallel."""
    model = load(path)
    before = logits(model)
    with pytest.raises(shardwise.PlanError, match="parallel already"):
        shardwise.parallelize(model, world("tp"))
    assert torch.equal(logits(model), before)


def test_parallelize_twice_is_refused(pool2, tmp_path_factory):
    """Guards: shards of shards, which would run, with the wrong numbers."""
    pool2.run(twice, checkpoint(tmp_path_factory, "llama"))


# --- what it looks like ---


def appearance(path: Path) -> str:
    """On a rank: the model as text."""
    model = load(path)
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__module__ == LlamaForCausalLM.__module__
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    assert model.state_dict().keys() == build("llama").state_dict().keys()
    assert model.device == torch.device("cpu")
    assert model.dtype is torch.float32
    return repr(model)


def test_repr_shows_local_and_full_sizes(pool2, tmp_path_factory):
    """Guards: a repr that tells the full sizes, or the local ones as if they were all; a class that isinstance does not
    know.
    """
    first, second = pool2.run(appearance, checkpoint(tmp_path_factory, "llama"))
    assert "(q_proj): ColwiseLinear(in_features=64, out_features=32 of 64, bias=False, tp=2)" in first
    assert "(down_proj): RowwiseLinear(in_features=48 of 96, out_features=64, bias=False, tp=2)" in first
    assert re.search(r"\(embed_tokens\): VocabParallelEmbedding\(64 of 127, 64, tp=2\)", first)
    assert re.search(r"\(embed_tokens\): VocabParallelEmbedding\(63 of 127, 64, tp=2\)", second)
    assert first.startswith("LlamaForCausalLM(")


# --- made anew ---


def anew(path: Path) -> None:
    """On a rank: models and layers that are made with the classes of parallel ones."""
    model = load(path)
    ordinary = type(model).from_pretrained(path)
    assert type(ordinary) is LlamaForCausalLM
    assert (logits(ordinary) - logits(model)).abs().max() < 1e-5
    assert type(type(model)(model.config)) is LlamaForCausalLM
    layer = model.model.layers[0].self_attn.q_proj
    made = type(layer)(3, 5, bias=False)
    assert (type(made), repr(made)) == (nn.Linear, "Linear(in_features=3, out_features=5, bias=False)")


def test_what_is_made_with_the_class_of_a_parallel_model_is_ordinary(pool2, tmp_path_factory):
    """Guards: a reference model (`type(model).from_pretrained`) of a parallel class, without what that needs to compute."""
    pool2.run(anew, checkpoint(tmp_path_factory, "llama"))


def load_parts(path: Path) -> None:
    """On a rank: full and local tensors, loaded into parts of a model that was zeroed."""
    model, full = load(path), LlamaForCausalLM.from_pretrained(path)
    expected, own = logits(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for parts in (
        full.model.state_dict(),
        {key.removeprefix("model."): t for key, t in own.items() if key.startswith("model.")},
    ):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.model.load_state_dict(parts)
        model.lm_head.load_state_dict(full.lm_head.state_dict())
        assert torch.equal(logits(model), expected)


def test_parts_of_a_model_load_full_tensors_too(pool2, tmp_path_factory):
    """Guards: a base model, or one layer, that refuses the tensors that the whole model takes."""
    pool2.run(load_parts, checkpoint(tmp_path_factory, "llama"))


def _resized() -> tuple[bool, str]:
    """On a rank: whether the size that they have is taken, and what is said of another."""
    model = shardwise.parallelize(build("llama"))
    size = model.config.vocab_size
    same = model.resize_token_embeddings(size) is model.get_input_embeddings()
    with pytest.raises(shardwise.errors.ShardwiseError) as error:
        model.resize_token_embeddings(size + 1)
    return same, str(error.value)


def test_embeddings_keep_their_size(pool2):
    """Guards: an error in scripts that resize to the length of a tokenizer that the model has room for already."""
    for same, text in pool2.run(_resized):
        assert same
        assert "cannot be resized" in text
