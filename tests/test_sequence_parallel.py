"""`sequence_parallel=True`: what one process computes, on slices of the sequence; which modules take part, what is sent, what
is kept.

Tolerances as in `test_parity.py`: a norm's gradient that is not summed over the ranks is wrong by half its size.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import models
import shardwise
from blocks import tp_axis
from figures import Figures, gradient_error, gradients, load_sharded, measure, measure_sharded
from models import COMMON
from parity.types import on_meta
from sequenced import OTHERS, WHOLE, build, measure_split, of_length, split, train
from shardwise.collectives import gather_from_tp
from shardwise.errors import PlanError
from shardwise.layers import SequenceLayer, is_parallel
from shardwise.sequence import with_sequence

# --- parity ---


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, 2) for name in (*models.TYPES, *OTHERS)),
        *((name, 4) for name in ("llama", "qwen3", "phi3", "starcoder2", "mixtral", "gpt2")),
    ],
)
def test_what_one_process_computes(name, size, pool2, pool4):
    """Guards: positions lost, doubled or out of order (of the micro-batches, two are odd and one is padded); a norm's or a
    bias's gradient of one rank's positions; a router's summed tp times; accumulated gradients summed again; a cache with
    slices in it; a norm that counts what is summed twice.
    """
    expected = measure(build(name))
    for rank, (found, kinds) in enumerate({2: pool2, 4: pool4}[size].run(measure_split, name)):
        assert kinds == {"SequenceLayer", "SequenceRegion", *(["SequenceWhole"] if name in WHOLE else [])}
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.losses, expected.losses, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=0)
        assert torch.equal(found.greedy, expected.greedy)
        if rank == 0:
            for ours, plain in zip(found.gradients, expected.gradients, strict=True):
                assert gradient_error(ours, plain) < 1e-3
            assert gradient_error(found.clipped, expected.clipped) < 1e-3


def lengths(evaluated: bool) -> list[dict[str, Tensor] | None]:
    """On a rank: gradients of sequences of 1 to 9 positions."""
    model = split("llama").train(not evaluated)
    found = []
    for length in range(2, 10):
        found.append(train(model, of_length(length)))
        model.zero_grad()
    return found


@pytest.mark.parametrize("evaluated", [False, True])
def test_sequences_that_are_not_cut(evaluated, pool4):
    """Guards: norms' gradients summed where every rank has seen all positions: sequences too short for four ranks, and
    evaluation mode; slices of unequal lengths.
    """
    model = build("llama").train(not evaluated)
    for length, found in zip(range(2, 10), pool4.run(lengths, evaluated)[0], strict=True):
        assert gradient_error(found, train(model, of_length(length))) < 1e-3
        model.zero_grad()


def loaded(path: Path, saved: Path) -> tuple[Figures, int]:
    """On a rank: a loaded model."""
    model = load_sharded(path, sequence_parallel=True)
    return measure_sharded(path, saved, sequence_parallel=True), sum(isinstance(m, SequenceLayer) for m in model.modules())


def test_loading_and_saving(pool2, tmp_path_factory, tmp_path):
    """Guards: a keyword that is handed to transformers, or dropped; other bytes in the checkpoint."""
    path = models.checkpoint(tmp_path_factory, "llama")
    expected = measure(AutoModelForCausalLM.from_pretrained(path))
    for found, layers in pool2.run(loaded, path, tmp_path / "saved"):
        assert layers == 2
        torch.testing.assert_close(found.losses, expected.losses, atol=1e-5, rtol=0)
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


# --- recomputation ---


def recomputed(reentrant: bool | None) -> dict[str, Tensor] | None:
    """On a rank: gradients of two forwards, and then their backwards, under gradient checkpointing (None: without)."""
    model = split("llama")
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    first, second = (of_length(length).loss(model) for length in (7, 8))
    first.backward()
    second.backward()
    return gradients(model)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_recomputed_layers(reentrant, pool2):
    """Guards: a recomputed layer that takes the lengths of the last forward for those of its own: the first rank has four of
    seven and of eight positions.
    """
    expected = train(build("llama"), of_length(7), of_length(8))
    assert gradient_error(pool2.run(recomputed, reentrant)[0], expected) < 1e-3


# --- the model as an object ---


def planned() -> dict[str, Tensor] | None:
    """On a rank: the gradients of a model by the plan of another one."""
    model = shardwise.parallelize(build("llama"), tp_axis(), plan=split("llama")._shardwise.plan)
    assert isinstance(model.model.layers[0], SequenceLayer)
    return train(model, of_length(7))


def test_a_plan_that_says_so(pool2):
    """Guards: a plan whose rows are sequence parallel, of which only a part is carried out without the keyword."""
    assert gradient_error(pool2.run(planned)[0], train(build("llama"), of_length(7))) < 1e-3


def copied_and_undone() -> tuple[dict[str, Tensor] | None, ...]:
    """On a rank: the gradients of a model, of its copy, and of the ordinary model that it was."""
    model = split("qwen3")
    other = copy.deepcopy(model)
    layer, twin = (m.model.layers[0] for m in (model, other))
    assert twin._tp.stream is twin.mlp.down_proj._tp.stream
    assert twin._tp.stream is not layer._tp.stream
    found = (train(other, of_length(7)), train(model, of_length(7)))
    model.zero_grad()
    shardwise.unparallelize(model)
    assert not any(is_parallel(m) for m in model.modules())
    return (*found, train(model, of_length(7)))


def test_copies_and_the_way_back(pool2):
    """Guards: a copy that shares the original's stream, and a class that stays."""
    expected = train(build("qwen3"), of_length(7))
    for found in pool2.run(copied_and_undone)[0]:
        assert gradient_error(found, expected) < 1e-3


def adapted() -> bool:
    """On a rank: whether the one norm that is trained gets the whole gradient, and nothing else one."""
    model, plain = split("llama").requires_grad_(False), build("llama").requires_grad_(False)
    for m in (model, plain):
        m.model.layers[0].input_layernorm.weight.requires_grad_(True)
        of_length(8).loss(m).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.layers.0.input_layernorm.weight"]
    ours, expected = (m.model.layers[0].input_layernorm.weight.grad for m in (model, plain))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    return True


def test_frozen_parameters(pool2):
    """Guards: frozen parameters that are copied and summed with the others."""
    assert all(pool2.run(adapted))


# --- dropout ---


def masks(name: str, module: str, **changes: object) -> tuple[bool, bool, bool]:
    """On a rank: whether a dropout of the stream leaves the same elements on all ranks, whether it does so when the stream is
    whole, and whether the ranks' random states agree behind it.
    """
    model = split(name, **changes)
    seen: list[Tensor] = []
    model.get_submodule(module).register_forward_hook(lambda module, args, output: seen.append(output.detach() == 0))
    with torch.no_grad():
        model(input_ids=of_length(8).input_ids)
        model(input_ids=of_length(3).input_ids)
    state = torch.get_rng_state()
    return agree(seen[0]), agree(seen[1]), agree(state)


def agree(tensor: Tensor) -> bool:
    """Whether all ranks hold the same."""
    first, *others = gather_from_tp(tensor.to(torch.uint8).unsqueeze(0), tp_axis(), 0).unbind(0)
    return all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("name", "module"), [("phi3", "model.layers.0.resid_attn_dropout"), ("gpt2", "transformer.h.0.attn.resid_dropout")]
)
def test_masks_of_different_positions(name, module, pool2):
    """Guards: one mask for the slices of all ranks; masks that differ where the stream is whole; ranks whose random states
    drift apart.
    """
    assert pool2.run(masks, name, module, resid_pdrop=0.5) == [(False, True, True)] * 2


# --- what is sent, and what is kept ---


def sent(name: str, layers: int, sequence_parallel: bool) -> Counter[str]:
    """On a rank: the collectives of a training step."""
    model = shardwise.parallelize(build(name, num_hidden_layers=layers), tp_axis(), sequence_parallel=sequence_parallel)
    batch = of_length(8)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        batch.loss(model).backward()
    return Counter(event.name for event in seen.events() if event.name.startswith("c10d::"))


def test_collectives_of_a_layer(pool2):
    """Guards: an all-reduce that stays beside the gathers, and one for every norm. Two gathers and two reduce-scatters in
    each direction are the bytes of four all-reduces; one all-reduce sums the gradients of both norms.
    """
    plain = {layers: pool2.run(sent, "llama", layers, False)[0] for layers in (1, 2)}
    cut = {layers: pool2.run(sent, "llama", layers, True)[0] for layers in (1, 2)}
    assert plain[2] - plain[1] == Counter({"c10d::allreduce_": 4})
    assert cut[2] - cut[1] == Counter({"c10d::_allgather_base_": 4, "c10d::_reduce_scatter_base_": 4, "c10d::allreduce_": 1})


def kept(layers: int, sequence_parallel: bool) -> tuple[int, int]:
    """On a rank: how many hidden states are kept for backward, of all positions and of slices."""
    model = shardwise.parallelize(build("llama", num_hidden_layers=layers), tp_axis(), sequence_parallel=sequence_parallel)
    weights = {p.data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() in (2, 3) and tensor.shape[-1] == COMMON["hidden_size"] and tensor.data_ptr() not in weights:
            seen[tensor.data_ptr()] = tensor.numel() // tensor.shape[-1]
            alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        of_length(8).loss(model)
    counts = Counter(seen.values())
    return counts[16], counts[8]


def test_activations_that_are_kept(pool2):
    """Guards: hidden states kept whole somewhere between the regions. Of all positions, a layer keeps what its regions read
    (a weight's gradient needs it), and else slices.
    """
    one, two = (pool2.run(kept, layers, True)[0] for layers in (1, 2))
    whole_one, whole_two = (pool2.run(kept, layers, False)[0] for layers in (1, 2))
    of_layer, of_whole_layer = [b - a for a, b in zip(one, two, strict=True)], whole_two[0] - whole_one[0]
    assert of_layer == [2, 4]
    assert of_whole_layer == 6
    assert whole_two[1] == whole_one[1]


# --- refusals ---


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bloom", "transformer.h.0 can't work .* alibi"),
        ("opt", "model.decoder.layers.0.fc1 can't work .* linear layer that is split"),
        ("jamba", "mamba can't work .* cache_params"),
        ("gemma3n_text", "per_layer_input"),
        ("longcat_flash", "calls what is in it"),
        ("hrm_text", "2 lists of parallel layers"),
    ],
)
def test_what_does_more_with_its_hidden_states(name, says):
    """Guards: a decoder that combines slices with something of all positions, or sums over ranks what is local, silently."""
    model = on_meta(name)
    plan = shardwise.plan(model, 2)
    with pytest.raises(PlanError, match=says):
        with_sequence(model, plan)


def test_keywords(threads):
    """Guards: a keyword that does nothing, or half of what it says."""

    def ask(**keywords: object) -> str:
        with pytest.raises(PlanError) as error:
            shardwise.parallelize(build("llama"), tp_axis(), **keywords)
        return str(error.value)

    assert "True or False" in threads(ask, 2, sequence_parallel="yes")[0]
    assert "overlap=True" in threads(ask, 2, sequence_parallel=True, overlap=True)[0]
    with pytest.raises(PlanError, match="needs ranks"):
        shardwise.AutoModelForCausalLM.from_pretrained("nowhere", sequence_parallel=True)
