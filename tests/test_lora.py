"""PEFT's adapters on a parallel model: the numbers, the files and the tokens of one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import shardwise
from figures import gradient_error, gradients
from models import batches, checkpoint
from on_ranks import load, world
from shardwise.errors import MissingRankError, ShardwiseError
from shardwise.rendezvous import meet

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERYTHING = [*LINEARS, "embed_tokens", "lm_head"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # PEFT asks by the old name
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Could not find a config file",
    "ignore:.*LoRA tensor.* have invalid shape",  # lora_bias has one dim
)


def lora(**changes: object) -> LoraConfig:
    """A config whose numbers are those of no other dimension."""
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **changes})


def adapter(path: Path, folder: Path, seed: int = 5, **changes: object) -> Path:
    """A directory with a trained-looking adapter (B is not zero) for the checkpoint at `path`."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), lora(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@dataclass
class Found:
    """What a model with an adapter gives; gradients of the adapter, accumulated over one, two and three micro-batches."""

    logits: Tensor
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor] | None] = field(default_factory=list)
    norm: float = 0.0
    tokens: Tensor | None = None
    merged: Tensor | None = None
    stepped: Tensor | None = None


def measure(model: PeftModel) -> Found:
    """Everything that is compared; the model is merged in the end."""
    inner, batch = model.get_base_model(), batches()[0]
    found = Found(_logits(model.eval()))
    model.train()
    for micro in batches():
        loss = micro.loss(model)
        loss.backward()
        found.losses.append(loss.item())
        found.gradients.append(gradients(inner))
    found.norm = shardwise.clip_grad_norm_(model, 1e3).item()
    found.tokens = model.eval().generate(input_ids=batch.input_ids, max_new_tokens=6, do_sample=False)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    found.stepped = _logits(model)
    found.merged = _logits(model.merge_and_unload())
    return found


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batches()[0].input_ids).logits


def plain(path: Path, folder: Path) -> PeftModel:
    """In this process."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def measure_sharded(path: Path, folder: Path, **keywords: object) -> Found:
    """On a rank."""
    return measure(PeftModel.from_pretrained(load(path, **keywords), folder, is_trainable=True))


def compare(ranks: list[Found], expected: Found) -> None:
    """Float32 noise of sums of some hundred terms; a part that is missing or doubled is the size of the value itself."""
    for found in ranks:
        torch.testing.assert_close(found.logits, expected.logits, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(found.stepped, expected.stepped, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.merged, expected.merged, atol=1e-3, rtol=1e-3)
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        assert found.norm == pytest.approx(expected.norm, rel=1e-4)
        assert torch.equal(found.tokens, expected.tokens)
    assert all(expected.gradients)
    for found, wanted in zip(ranks[0].gradients, expected.gradients, strict=True):
        assert gradient_error(found, wanted) < 1e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"target_modules": EVERYTHING}),
        ("qwen2", {"use_rslora": True, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
        ("gemma2", {"modules_to_save": ["o_proj"], "target_modules": ["q_proj", "k_proj", "down_proj"]}),
        ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
        ("deepseek_v3", {"target_modules": ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"]}),
    ],
)
def test_adapter_of_two_ranks_is_that_of_one_process(pool2, tmp_path_factory, name, changes):
    """Guards: an A behind a column-wise layer whose gradient is a part, a B as long as the whole layer, a row-wise A whose
    product is not summed or summed twice, in logits, gradients, clipping, tokens and merging.
    """
    path = checkpoint(tmp_path_factory, name)
    folder = adapter(path, tmp_path_factory.mktemp(f"adapter-{name}"), **changes)
    compare(pool2.run(measure_sharded, path, folder), measure(plain(path, folder)))


def test_adapter_of_four_ranks_that_share_kv_heads(pool4, tmp_path_factory):
    """Guards: B of a shared KV head, whose gradient each of its ranks has a part of, and of which only one may count in the
    norm.
    """
    path = checkpoint(tmp_path_factory, "llama")
    folder = adapter(path, tmp_path_factory.mktemp("adapter"))
    compare(pool4.run(measure_sharded, path, folder), measure(plain(path, folder)))


def padded(model: PeftModel) -> dict[str, Tensor] | None:
    """Gradients of the adapter of an embedding whose padding id is among the ids."""
    batches()[0].loss(model.train()).backward()
    return gradients(model.get_base_model())


def padded_sharded(path: Path, folder: Path, pad: int) -> dict[str, Tensor] | None:
    """On a rank."""
    return padded(PeftModel.from_pretrained(load(path, pad_token_id=pad), folder, is_trainable=True))


def test_padding_id_of_an_adapted_embedding(pool2, tmp_path_factory):
    """Guards: a padding id counted from the first row of a rank's part of the vocabulary, in an adapter of all of it: it would
    be trained, or another id would not.
    """
    path, pad = checkpoint(tmp_path_factory, "llama"), int(batches()[0].input_ids.max())
    assert pad >= 64  # of the second rank
    folder = adapter(path, tmp_path_factory.mktemp("adapter"), target_modules=["embed_tokens"])
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, pad_token_id=pad)
    wanted = padded(PeftModel.from_pretrained(base, folder, is_trainable=True))
    for found in pool2.run(padded_sharded, path, folder, pad)[:1]:
        assert gradient_error(found, wanted) < 1e-3


# --- files ---


def save(path: Path, folder: Path, out: Path) -> None:
    """On a rank: the adapter goes through the ranks, and is saved by PEFT and by transformers."""
    model = PeftModel.from_pretrained(load(path), folder, is_trainable=True)
    model.save_pretrained(out / "peft", is_main_process=dist.get_rank() == 0)
    inner = load(path)
    inner.load_adapter(folder)
    inner.save_pretrained(out / "transformers")
    fresh = load(path)
    fresh.add_adapter(lora())
    fresh.save_pretrained(out / "fresh")


def test_saved_adapter_is_the_ordinary_one(pool2, tmp_path_factory):
    """Guards: a file with one rank's part, or with the parts in another order. Bit for bit: nothing is computed."""
    path, out = checkpoint(tmp_path_factory, "llama"), tmp_path_factory.mktemp("saved")
    folder = adapter(path, out / "trained", target_modules=EVERYTHING)
    pool2.run(save, path, folder, out)
    wanted = load_file(folder / "adapter_model.safetensors")
    for name in ("peft", "transformers"):
        found = load_file(out / name / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
        assert (out / name / "adapter_config.json").exists()
    shapes = {key: tensor.shape for key, tensor in load_file(out / "fresh/adapter_model.safetensors").items()}
    assert shapes == {key: tensor.shape for key, tensor in wanted.items() if "embed_tokens" not in key and "lm_head" not in key}


def save_on_one_rank(path: Path, folder: Path) -> str:
    """On a rank: only the first one saves."""
    model = get_peft_model(load(path), lora())
    if dist.get_rank():
        return ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shardwise.state, "meet", partial(meet, timeout=0.5))
        with pytest.raises(MissingRankError) as error:
            model.save_pretrained(folder)
    return str(error.value)


def test_saving_on_one_rank_raises(pool2, tmp_path_factory):
    """Guards: a save on the first rank only that waits for the others for ever."""
    message = pool2.run(save_on_one_rank, checkpoint(tmp_path_factory, "llama"), tmp_path_factory.mktemp("one"))[0]
    assert "rank 1 had not called it" in message


# --- ways in ---


def ways_in(path: Path, folder: Path) -> list[tuple[Tensor, dict[str, Tensor] | None]]:
    """On a rank: logits and gradients with the same adapter, put in by every way there is."""

    def by_parallelize(inside: bool) -> nn.Module:
        model = plain(path, folder)
        shardwise.parallelize(model.get_base_model() if inside else model, world("tp"))
        return model

    def by_other_styles() -> nn.Module:
        model = plain(path, folder)
        plan = {f"layers.*.mlp.{name}_proj": "colwise_gather_output" for name in ("up", "gate")}
        plan |= {"layers.*.mlp.down_proj": "rowwise_split_input"}
        return shardwise.parallelize(model, world("tp"), plan)

    def by_transformers() -> nn.Module:
        model = load(path)
        model.load_adapter(folder, is_trainable=True)
        return model

    def by_second() -> nn.Module:
        model = get_peft_model(load(path), lora(target_modules=["q_proj", "down_proj"]), "other")
        model.load_adapter(folder, "default", is_trainable=True)  # on layers that have an adapter, and on others
        model.set_adapter("default")
        return model

    def by_meta() -> nn.Module:
        return PeftModel.from_pretrained(load(path), folder, is_trainable=True, low_cpu_mem_usage=True)

    found, ways = [], [lambda: by_parallelize(False), lambda: by_parallelize(True), by_transformers, by_second, by_meta]
    for way in (*ways, by_other_styles):
        model = way().train()
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        batches()[1].loss(model).backward()
        found.append((_logits(model), gradients(inner)))
    return found


def test_every_way_to_add_an_adapter(pool2, tmp_path_factory):
    """Guards: an adapter that one of the ways leaves as it was: second ones, ones that were there before the model became
    parallel, ones of transformers' own methods.
    """
    path = checkpoint(tmp_path_factory, "llama")
    folder = adapter(path, tmp_path_factory.mktemp("adapter"))
    reference = plain(path, folder)
    batches()[1].loss(reference).backward()
    wanted, logits = gradients(reference.get_base_model()), _logits(reference)
    for found, grads in pool2.run(ways_in, path, folder)[0]:
        torch.testing.assert_close(found, logits, atol=2e-4, rtol=1e-4)
        assert gradient_error({name: grad for name, grad in grads.items() if ".other." not in name}, wanted) < 1e-3


def fresh_adapters(path: Path, seed: int) -> tuple[dict[str, Tensor] | None, str]:
    """On a rank, whose seed is another one than the first rank's."""
    inner = load(path)
    torch.manual_seed(seed + dist.get_rank())
    get_peft_model(inner, lora())
    text = repr(inner.model.layers[0].self_attn.o_proj)
    full = shardwise.full_state_dict(inner)
    shardwise.unparallelize(inner)
    if full is not None:
        assert all(torch.equal(full[name], tensor) for name, tensor in inner.state_dict().items())
    return full, text


def test_new_adapter_is_that_of_one_process(pool2, tmp_path_factory):
    """Guards: a row-wise A drawn at its local width (of another variance than the layer's), the same for every rank; and
    replicas that start out different.
    """
    path = checkpoint(tmp_path_factory, "llama")
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(3)
    get_peft_model(reference, lora())
    full, text = pool2.run(fresh_adapters, path, 3)[0]
    assert full.keys() == reference.state_dict().keys()
    # a row-wise A is not sent: each rank keeps its part of what it drew
    same = [name for name, tensor in reference.state_dict().items() if torch.equal(full[name], tensor)]
    assert len(same) == len(full)
    assert "(default): RowwiseLinear(in_features=32 of 64, out_features=3, bias=False, tp=2)" in text


# --- what is refused ---


def refusals(path: Path) -> dict[str, str]:
    """On a rank: what each of these says."""
    tries = {
        "pissa": lora(init_lora_weights="pissa"),
        "bias": lora(bias="all"),
        "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "parameters": lora(target_modules=[], target_parameters=["self_attn.q_proj.weight"]),
        "tokens": lora(trainable_token_indices=[1, 2]),
    }
    found = {}
    for name, config in tries.items():
        model = load(path)
        with pytest.raises(ShardwiseError) as error:
            get_peft_model(model, config)
        found[name] = str(error.value)
        with pytest.raises(ShardwiseError):  # also for who goes on all the same
            model(input_ids=batches()[0].input_ids)
    with pytest.raises(RuntimeError, match="size of tensor"):  # PEFT's own, about a norm that needs the whole weight
        get_peft_model(load(path), lora(use_dora=True))
    model = load(path, sequence_parallel=True)
    with pytest.raises(ShardwiseError) as error:
        get_peft_model(model, lora())
    return found | {"sequence": str(error.value)}


def test_adapters_that_would_be_wrong_are_refused(pool2, tmp_path_factory):
    """Guards: norms, decompositions and element-wise factors of one rank's part of a weight, which have the right shapes."""
    found = pool2.run(refusals, checkpoint(tmp_path_factory, "llama"))[0]
    for name, words in {
        "pissa": "init_lora_weights='pissa'",
        "bias": "bias='all'",
        "ia3": "type IA3, not LORA",
        "parameters": "ParamWrapper is no plain LoRA layer",
        "tokens": "trainable_token_indices",
        "sequence": "sequence_parallel",
    }.items():
        assert words in found[name]


def weighted(path: Path, first: Path, second: Path) -> tuple[Tensor, str]:
    """On a rank: the logits of a sum of adapters, and what a decomposition of one says."""
    model = PeftModel.from_pretrained(load(path), first, "a")
    model.load_adapter(second, "b")
    _logits(model)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "sum", combination_type="linear")
    model.set_adapter("sum")
    found = _logits(model.eval())
    model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "svd", combination_type="svd")
    with pytest.raises(ShardwiseError) as error:
        _logits(model)
    return found, str(error.value)


def test_weighted_adapters(pool2, tmp_path_factory):
    """Guards: an adapter made of the ranks' parts of others, cut once more, or another one on every rank."""
    path = checkpoint(tmp_path_factory, "llama")
    folders = [adapter(path, tmp_path_factory.mktemp("adapter"), seed) for seed in (5, 6)]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), folders[0], "a")
    model.load_adapter(folders[1], "b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "sum", combination_type="linear")
    model.set_adapter("sum")
    found, error = pool2.run(weighted, path, *folders)[0]
    torch.testing.assert_close(found, _logits(model.eval()), atol=2e-4, rtol=1e-4)
    assert "differs between ranks" in error


# --- in company ---


def company(path: Path, folder: Path) -> list[dict[str, Tensor] | None]:
    """On a rank: gradients under activation checkpointing, under torch.compile, with overlap, and in GPT-2's Conv1D."""

    def checkpointing() -> PeftModel:
        model = PeftModel.from_pretrained(load(path), folder, is_trainable=True)
        model.gradient_checkpointing_enable()
        return model

    def compiled() -> PeftModel:
        model = PeftModel.from_pretrained(load(path), folder, is_trainable=True)
        model.get_base_model().model.compile(fullgraph=True, backend="aot_eager")
        return model

    def overlapped() -> PeftModel:
        return PeftModel.from_pretrained(load(path, overlap=True), folder, is_trainable=True)

    found = []
    for make in (checkpointing, compiled, overlapped):
        model = make().train()
        batches()[1].loss(model).backward()
        found.append(gradients(model.get_base_model()))
    return found


def test_adapters_in_company(pool2, tmp_path_factory):
    """Guards: a recomputed or compiled forward that goes another way than the eager one."""
    path = checkpoint(tmp_path_factory, "llama")
    folder = adapter(path, tmp_path_factory.mktemp("adapter"))
    reference = plain(path, folder).train()
    batches()[1].loss(reference).backward()
    wanted = gradients(reference.get_base_model())
    for found in pool2.run(company, path, folder)[0]:
        assert gradient_error(found, wanted) < 1e-3


GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 127, "n_positions": 48}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": None}


def test_adapter_of_conv1d(pool2, tmp_path_factory):
    """Guards: an adapter around a layer that keeps its weight transposed, of which PEFT reads the local width."""
    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained(path)
    changes = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    folder = adapter(path, tmp_path_factory.mktemp("adapter"), **changes)
    compare(pool2.run(measure_sharded, path, folder), measure(plain(path, folder)))


def masks(path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """On a rank, in training with dropout in attention: which elements the adapters of q and of o drop out."""
    inner = load(path, attention_dropout=0.5)
    model = get_peft_model(inner, lora(lora_dropout=0.5, target_modules=["q_proj", "v_proj", "o_proj"])).train()
    found: dict[str, list[Tensor]] = {"v_proj": [], "o_proj": []}
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.default") and (kind := name.split(".")[-3]) in found:
            module.register_forward_hook(lambda _, __, output, kind=kind: found[kind].append(output == 0))
    model(input_ids=batches()[0].input_ids)
    return found["v_proj"], found["o_proj"]


def test_dropout_of_adapters(pool2, tmp_path_factory):
    """Guards: masks of replicated inputs that differ between ranks (inside of attention, whose random stream is a rank's own),
    and masks of local features that are alike.
    """
    (whole, local), (whole_1, local_1) = pool2.run(masks, checkpoint(tmp_path_factory, "llama"))
    assert len(whole) == len(local) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole, whole_1, strict=True))
    assert all(0.3 < mask.float().mean() < 0.7 for mask in (*whole, *local))
    assert all((a == b).float().mean() < 0.7 for a, b in zip(local, local_1, strict=True))
