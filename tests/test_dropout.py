"""Dropout: masks agree where activations are whole, differ where they are local, and come back when recomputed.

On processes: ranks on threads share one random generator. The pool seeds each rank with its own number.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Starcoder2Config, Wav2Vec2Config, Wav2Vec2ForCTC

import shardwise
from blocks import ATTENTION_PLAN, Attention, under
from llamas import IDS, TINY
from shardwise import hf
from shardwise.collectives import gather_from_tp
from shardwise.layers import region
from shardwise.mesh import device_type

LLAMA = LlamaConfig(**TINY, attention_dropout=0.5)
STARCODER = Starcoder2Config(**TINY, attention_dropout=0.5, residual_dropout=0.5, embedding_dropout=0.5)


def tp_axis() -> DeviceMesh:
    """All ranks, on GPUs where the ranks see some."""
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("tp",))


def random_state() -> Tensor:
    """Of the CPU's generator, and of the GPU's where ranks compute on one."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device_type() == "cuda" else [])
    return torch.cat(states).to(device_type())


def built(config: LlamaConfig | Starcoder2Config, alike_heads: bool = False) -> PreTrainedModel:
    """A parallel model in train mode; with `alike_heads` every head computes the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for layer in model.model.layers if alike_heads else ():
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            with torch.no_grad():
                linear.weight.copy_(linear.weight[:8].repeat(linear.out_features // 8, 1))
    return shardwise.parallelize(model, tp_axis()).train()


def of_every_rank(tensor: Tensor) -> list[Tensor]:
    """What the ranks hold, in their order."""
    return list(gather_from_tp(tensor.detach().unsqueeze(0), tp_axis(), 0).unbind(0))


def agree(tensor: Tensor) -> bool:
    """Whether all ranks hold the same bits."""
    first, *others = of_every_rank(tensor)
    return all(torch.equal(first, other) for other in others)


def _masks(config: LlamaConfig | Starcoder2Config, training: bool) -> dict[str, bool]:
    model = built(config, alike_heads=True).train(training)
    ids = IDS.to(model.device)
    found = {"seed": agree(random_state())}
    before = random_state()

    def heads(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.setdefault("heads", agree(args[0]))

    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(heads)
    outputs = model(ids, output_hidden_states=True)
    for number, hidden in enumerate(outputs.hidden_states):
        found[f"hidden {number}"] = agree(hidden)
    outputs.logits.sum().backward()
    found["gradient"] = agree(model.model.norm.weight.grad)
    found["stream"] = agree(random_state())
    found["used"] = not torch.equal(before, random_state())
    second = model(ids).logits
    found["again"] = torch.equal(outputs.logits, second)
    found["second"] = agree(second)
    return found


@pytest.mark.parametrize("config", [LLAMA, STARCODER], ids=["llama", "starcoder2"])
def test_masks_agree_where_they_must_and_differ_where_they_must(config, pool2):
    """Guards: attention masks that are the same for every rank's heads (all heads are alike here, so they would compute the
    same), residual masks that differ (the ranks' hidden states drift apart in silence), and a random stream that is left
    different behind the attention, or begins anew with the next step.
    """
    expected = {"heads": False, "again": False}
    for found in pool2.run(_masks, config, True):
        assert found == {name: expected.get(name, True) for name in found}


@pytest.mark.parametrize("config", [LLAMA, STARCODER], ids=["llama", "starcoder2"])
def test_evaluation_is_untouched(config, pool2):
    """Guards: random numbers drawn, or heads that differ, without dropout. So the check above bites."""
    for found in pool2.run(_masks, config, False):
        assert found == {name: name != "used" for name in found}


def _broken(config: LlamaConfig, method: str) -> dict[str, bool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(region._RandomState, method, lambda *arguments: None)
        return _masks(config, True)


def test_the_check_of_masks_bites(pool2):
    """Guards: a check that passes with the defects: one stream for all heads, and streams that stay apart behind them."""
    for alike, apart in zip(pool2.run(_broken, STARCODER, "diverge"), pool2.run(_broken, STARCODER, "restore"), strict=True):
        assert alike["heads"]
        assert not apart["stream"]
        assert not apart["hidden 2"]


def _gradients(config: LlamaConfig, checkpointing: str) -> dict[str, Tensor]:
    model = built(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    ids = IDS.to(model.device)
    torch.manual_seed(5)
    for _ in range(2):
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert agree(random_state())
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", [LLAMA, STARCODER], ids=["llama", "starcoder2"])
@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
@pytest.mark.filterwarnings("ignore:.*use_reentrant")
def test_recomputing_draws_the_same_masks(config, checkpointing, pool2):
    """Guards: gradients of other masks than the forward's, under activation checkpointing."""
    for plain, recomputed in zip(pool2.run(_gradients, config, ""), pool2.run(_gradients, config, checkpointing), strict=True):
        assert all(torch.equal(gradient, recomputed[name]) for name, gradient in plain.items())


def _loaded(path: str) -> tuple[bool, ...]:
    np.random.seed(dist.get_rank())
    np.random.standard_normal()  # numpy draws two of them at a time, and keeps the other one
    alike_before = agree(torch.get_rng_state())
    model = shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto").train()
    from_numpy = torch.from_numpy(np.random.standard_normal(3))
    return alike_before, agree(torch.get_rng_state()), agree(from_numpy), agree(model(IDS).logits)


def test_different_seeds_are_levelled_by_loading(pool2, tmp_path):
    """Guards: ranks that were seeded differently and therefore drop out different elements of the same activations, or mask
    other parts of a sound, which transformers draws from numpy.
    """
    AutoModelForCausalLM.from_config(STARCODER).save_pretrained(tmp_path)
    assert pool2.run(_loaded, str(tmp_path)) == [(False, True, True, True)] * 2


class Dropped(nn.Module):
    """Embedding, then dropout and a norm over slices of the sequence, then attention."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm, self.attn = nn.Dropout(0.5), nn.LayerNorm(12), Attention(dropout=0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, sequence, 12) -> what is dropped, and the output."""
        dropped = self.drop(x)
        return dropped, self.attn(self.norm(dropped))


def _sequence_parallel(length: int) -> tuple[bool, bool, bool, bool]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dropped()
    plan = {"drop": "sequence_parallel", "norm": "sequence_parallel", **under("attn", ATTENTION_PLAN)}
    model = shardwise.parallelize(model, tp_axis(), plan=plan)
    dropped, output = model(torch.ones(2, length, 12))
    half = length // 2
    return (
        agree(dropped),
        agree(output),
        agree(torch.get_rng_state()),
        torch.equal(dropped[:, :half], dropped[:, -half:]),
    )


@pytest.mark.parametrize("length", [6, 5])
def test_dropout_over_slices_of_the_sequence(length, pool2):
    """Guards: slices of different lengths that draw different amounts from the common stream, so that all later masks
    differ; and one mask for all slices.
    """
    assert pool2.run(_sequence_parallel, length) == [(True, True, True, False)] * 2


def _raises_in_a_region() -> tuple[bool, bool]:
    model = built(LLAMA)

    def fail(module: nn.Module, args: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(IDS)
    handle.remove()
    model(IDS)
    return agree(torch.get_rng_state()), dist.get_rank() >= 0


def test_an_exception_in_attention(pool2):
    """Guards: a loop that survives an error (out of memory, a smaller batch) with a random stream that differs from then on."""
    assert pool2.run(_raises_in_a_region) == [(True, True)] * 2


def test_configs_drop_and_mask_nothing_either():
    """Guards: layers left out, and sounds masked, by what code reads in a config: ranks on threads draw others, and wait for
    each other.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 31}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, layerdrop=0.5, conv_dim=(8,), conv_kernel=(20,), conv_stride=(20,)))
    hf.without_dropout(model)
    config = model.wav2vec2.encoder.config
    assert (config.layerdrop, config.apply_spec_augment, config.hidden_dropout) == (0.0, False, 0.0)
