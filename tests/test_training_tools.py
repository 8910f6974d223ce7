"""A parallel model trains as any other does: recomputing activations, under DDP, with fused optimizers, under autocast."""

from __future__ import annotations

from pathlib import Path
from types import MethodType

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

import shardwise
from figures import gradient_error, gradients
from models import batches, build, checkpoint
from on_ranks import load, logits, plain_gradients, world
from shardwise.errors import ShardwiseError
from shardwise.layers import is_parallel


def checkpointed(path: Path, use_reentrant: bool) -> None:
    """On a rank: gradients with and without recomputing, with dropout."""
    found = []
    for enable in (False, True):
        model = load(path, attention_dropout=0.3, attn_implementation="eager")
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        batches()[0].loss(model).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(name, use_reentrant, pool2, tmp_path_factory):
    """Guards: a memo of the input that outlives the first forward and joins the wrong graph; other dropout masks when
    recomputed.
    """
    pool2.run(checkpointed, checkpoint(tmp_path_factory, name), use_reentrant)


def data_parallel(path: Path) -> tuple[int, dict[str, Tensor] | None]:
    """On four ranks, dp=2 x tp=2: each dp rank takes its half of the batch."""
    mesh = world("dp", "tp", shape=(2, 2))
    model = DistributedDataParallel(load(path, mesh), process_group=mesh["dp"].get_group())
    ids = batches()[0].input_ids[mesh["dp"].get_local_rank()].unsqueeze(0)
    for _ in range(2):  # the second time DDP has rebuilt its buckets
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
    return dist.get_rank(), shardwise.full_gradients(model)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_distributed_data_parallel(name, pool4, tmp_path_factory):
    """Guards: parameters that DDP's buckets or hooks do not take, and gradients changed after its hook has seen them."""
    expected = plain_gradients(name, batches()[0])
    for rank, found in pool4.run(data_parallel, checkpoint(tmp_path_factory, name)):
        assert (found is not None) == (rank in (0, 2))
        assert found is None or gradient_error(found, expected) < 1e-3


def all_taken_for_replicas(path: Path) -> str:
    """On a rank: what DDP over the ranks of one model says, and, of an adapter, that it is refused too."""
    model = load(path)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ShardwiseError) as error:
        batches()[0].loss(wrapped)
    adapted = get_peft_model(load(path), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ShardwiseError):
        batches()[0].loss(DistributedDataParallel(adapted))
    return str(error.value)


def test_ranks_of_one_model_are_no_replicas(pool2, tmp_path_factory):
    """Guards: every rank left with the first one's shards, and their gradients averaged, as accelerate's Accelerator would have
    it.
    """
    for said in pool2.run(all_taken_for_replicas, checkpoint(tmp_path_factory, "mistral")):
        assert "made the parts on ranks 0, 1 all the first one's" in said


def multiplied(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Logits and gradients by a forward as TRL and Liger put in, which takes the head's weight and does not call the head."""

    def forward(self: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden, head = self.model(input_ids=input_ids).last_hidden_state, self.get_output_embeddings()
        return hidden @ head.weight.T, head(hidden)

    model.forward = MethodType(forward, model)
    if dist.is_initialized() and not is_parallel(model):
        shardwise.parallelize(model)
    ids = batches()[0].input_ids
    logits, called = model(ids)
    torch.testing.assert_close(logits, called, atol=1e-5, rtol=1e-4)
    for _ in range(2):
        torch.nn.functional.cross_entropy(sum(model(ids)).flatten(0, 1), ids.flatten()).backward()
    return logits.detach(), shardwise.full_gradients(model)


def multiplied_sharded(path: Path, loaded: bool) -> tuple[Tensor, dict[str, Tensor] | None]:
    """On a rank, of a model that was parallel before, or became it afterwards; the parameter itself stays its part."""
    model = load(path) if loaded else AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = multiplied(model)
    assert dict(model.named_parameters(remove_duplicate=False))["lm_head.weight"].shape[0] in (63, 64)
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_forward_that_multiplies_by_the_weight_of_the_head(name, pool2, tmp_path_factory):
    """Guards: logits of a rank's part of the vocabulary, and the loss of these, in trainers that compute it by the head's
    weight.
    """
    path = checkpoint(tmp_path_factory, name)
    logits, wanted = multiplied(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    for loaded in (True, False):
        found = pool2.run(multiplied_sharded, path, loaded)
        for mine, _ in found:
            torch.testing.assert_close(mine, logits, atol=2e-4, rtol=1e-4)
        assert gradient_error(found[0][1], wanted) < 1e-3


def steps_of(path: Path, **options: bool) -> dict[str, Tensor] | None:
    """On a rank: the parameters after three steps of AdamW."""
    model = load(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    for batch in batches():
        batch.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return shardwise.full_state_dict(model)


@pytest.mark.parametrize("option", ["foreach", "fused"])
def test_optimizers_over_many_tensors(option, pool2, tmp_path_factory):
    """Guards: parameters of several tensor types, which `foreach` and `fused` refuse."""
    path = checkpoint(tmp_path_factory, "qwen3")
    expected, actual = pool2.run(steps_of, path, foreach=False)[0], pool2.run(steps_of, path, **{option: True})[0]
    for name, parameter in expected.items():
        torch.testing.assert_close(actual[name], parameter, atol=1e-5, rtol=0)


def under_autocast(path: Path) -> tuple[Tensor, dict[str, Tensor] | None]:
    """On a rank: logits and gradients of a float32 model under autocast."""
    return _autocast(load(path))


def _autocast(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor] | None]:
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=batches()[0].input_ids, labels=batches()[0].labels)
    output.loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    return output.logits.detach().float(), gradients(model)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_autocast(name, pool2, tmp_path_factory):
    """Guards: a layer that calls its kernel past autocast, or a collective between dtypes. As close to float32 as one
    process is.
    """
    exact, (one, _) = logits(build(name)), _autocast(build(name))
    gradients_ = plain_gradients(name, batches()[0])
    (found, found_gradients), _ = pool2.run(under_autocast, checkpoint(tmp_path_factory, name))
    assert torch.dist(found, exact) < 1.5 * torch.dist(one, exact)
    top = max(gradient.abs().max() for gradient in gradients_.values())
    for key, gradient in gradients_.items():
        torch.testing.assert_close(found_gradients[key], gradient, atol=0.05 * top.item(), rtol=0)
