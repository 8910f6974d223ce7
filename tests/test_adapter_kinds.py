"""PEFT's other kinds of adapters on a parallel model: right, or refused before anything has been changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import config as lora_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import shardwise
from adapted import LINEARS, logits_of, lora
from figures import gradient_error, gradients
from models import batches, build, checkpoint
from on_ranks import load, world
from shardwise.errors import ShardwiseError

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # PEFT asks by the old name
    "ignore:Position ids are not supported",
)
CAUSAL = {"task_type": "CAUSAL_LM"}
VIRTUAL: dict[str, Callable[[], peft.PeftConfig]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **CAUSAL),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "projected prefix": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **CAUSAL
    ),
    "cartridge": lambda: peft.CartridgeConfig(num_virtual_tokens=3, **CAUSAL),
}
Virtual = dict[str, tuple[Tensor, dict[str, Tensor], Tensor]]


def virtual(models: Callable[[], nn.Module]) -> Virtual:
    """With each kind of virtual tokens: logits, all gradients of two micro-batches, and generated tokens."""
    found = {}
    for name, make in VIRTUAL.items():
        inner = models()
        torch.manual_seed(3)
        wrapped = get_peft_model(inner, make())
        with torch.no_grad():
            for parameter in wrapped.prompt_encoder.parameters():
                parameter.mul_(3).sub_(0.1)  # away from what is symmetric
        for batch in batches()[:2]:
            batch.loss(wrapped).backward()
        grads = {key: parameter.grad for key, parameter in wrapped.prompt_encoder.named_parameters()}
        tokens = wrapped.eval().generate(input_ids=batches()[0].input_ids, max_new_tokens=5, do_sample=False)
        found[name] = logits_of(wrapped), {key: grad for key, grad in grads.items() if grad is not None}, tokens
    return found


def virtual_sharded(path: Path) -> Virtual:
    """On a rank."""
    return virtual(lambda: load(path))


@pytest.mark.parametrize("size", [2, 4])
def test_virtual_tokens(size, pool2, pool4, tmp_path_factory):
    """Guards: word embeddings that PEFT does not find by their length; keys and values of all heads in front of a rank's own;
    a gradient of a rank's heads alone, or, of heads that several ranks keep, of one of them. Two KV heads, on two ranks and
    on four.
    """
    path = checkpoint(tmp_path_factory, "llama")
    wanted = virtual(lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    for found in (pool2 if size == 2 else pool4).run(virtual_sharded, path):
        for name, (logits, grads, tokens) in wanted.items():
            torch.testing.assert_close(found[name][0], logits, atol=2e-4, rtol=1e-3)
            assert gradient_error(found[name][1], grads) < 1e-4, name
            assert torch.equal(found[name][2], tokens), name


def invoked(model: PeftModel) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Logits, and gradients of an adapter that starts to act within the text."""
    inner, batch = model.get_base_model(), batches()[0]
    batch.loss(model.train()).backward()
    return logits_of(model.eval()), gradients(inner)


def invoked_sharded(path: Path, folder: Path) -> tuple[Tensor, dict[str, Tensor] | None]:
    """On a rank."""
    return invoked(PeftModel.from_pretrained(load(path), folder, is_trainable=True))


def test_adapter_that_is_invoked(pool2, tmp_path_factory):
    """Guards: activated LoRA, whose products are of the tokens after a word, added past a collective or twice."""
    path, folder = checkpoint(tmp_path_factory, "llama"), tmp_path_factory.mktemp("adapter")
    torch.manual_seed(5)
    word = int(batches()[0].input_ids[0, -4])
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), lora(alora_invocation_tokens=[word])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 if parameter.requires_grad else 0)
    model.save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    logits, wanted = invoked(PeftModel.from_pretrained(base, folder, is_trainable=True))
    assert wanted is not None
    assert any(gradient.any() for gradient in wanted.values())
    results = pool2.run(invoked_sharded, path, folder)
    assert all((found - logits).abs().max() < 2e-4 for found, _ in results)
    assert gradient_error(results[0][1], wanted) < 1e-3


# --- what is refused ---

LORA: dict[str, Callable[[], dict[str, object]]] = {
    "init_lora_weights='pissa'": lambda: {"init_lora_weights": "pissa"},
    "init_lora_weights='olora'": lambda: {"init_lora_weights": "olora"},
    "init_lora_weights='eva'": lambda: {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "trainable_token_indices": lambda: {"trainable_token_indices": [1, 100]},
    "layer_replication": lambda: {"layer_replication": [(0, 2), (1, 2)]},
    "kasa_config": lambda: {"kasa_config": lora_config.KasaConfig()},
    "velora_config": lambda: {"velora_config": {}},
    "monteclora_config": lambda: {"monteclora_config": lora_config.MontecloraConfig()},
}
OTHERS: dict[str, dict[str, object]] = {
    "IA3": {"feedforward_modules": ["down_proj"]},
    "AdaLora": {"total_step": 10, "init_r": 4, "target_r": 2},
    "BOFT": {"boft_block_size": 4},
    "Deft": {},  # of which, and the next one, PEFT's own errors come first otherwise
    "Glora": {},
    "FourierFT": {"n_frequency": 20},
    "HRA": {"r": 4},
    "LoHa": {"r": 4},
    "LoKr": {"r": 4},
    "Miss": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 8},
    "OSF": {},  # this one changes the weights
    "Poly": {"r": 4},
    "RandLora": {"r": 4},
    "Shira": {"r": 2},
    "VBLoRA": {"r": 4, "num_vectors": 8, "vector_length": 8},
    "Vera": {"r": 4},
}


def refusals(path: Path, fused: Path) -> dict[str, str]:
    """On a rank: what each of these says, of one model, which stays what it was."""
    configs: dict[str, peft.PeftConfig] = {name: lora(**changes()) for name, changes in LORA.items()}
    configs |= {f"type {n.upper()}": getattr(peft, f"{n}Config")(target_modules=LINEARS, **o) for n, o in OTHERS.items()}
    configs["type LN_TUNING"] = peft.LNTuningConfig(target_modules=["input_layernorm"])
    configs["type TRAINABLE_TOKENS"] = peft.TrainableTokensConfig(token_indices=[1, 100])
    configs["type ADAPTION_PROMPT"] = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **CAUSAL)
    model, found = load(path).eval(), {}
    before, logits = {name: tensor.clone() for name, tensor in model.named_parameters()}, logits_of(model)
    for name, config in configs.items():
        with pytest.raises(ShardwiseError) as error:
            get_peft_model(model, config)
        found[name] = str(error.value)
    for other in ("type IA3", "layer_replication"):
        with pytest.raises(ShardwiseError, match=other):
            model.add_adapter(configs[other], "other")
    with pytest.raises(ValueError, match="Target modules"):  # PEFT's own, when it has begun
        get_peft_model(model, lora(use_dora=True, target_modules=["nowhere"]))
    assert torch.equal(logits_of(model), logits)
    assert all(torch.equal(tensor, before.pop(name)) for name, tensor in model.named_parameters())
    assert not before
    with pytest.raises(ShardwiseError) as error:
        get_peft_model(load(fused), VIRTUAL["prefix"]())
    return found | {"k_proj and v_proj of their own": str(error.value)} | later_refusals(path)


def later_refusals(path: Path) -> dict[str, str]:
    """On a rank: what is found when PEFT has made its layers, or in a model that has an adapter before it is parallel."""
    found = {}
    tries = {
        "is no stack of experts": lora(target_modules=[], target_parameters=["self_attn.q_proj.weight"]),
        "DoraEmbeddingVariant": lora(use_dora=True, target_modules=["embed_tokens"]),
        "DoRA around a layer of style ColwiseGatherOutput": lora(use_dora=True, target_modules=["lm_head"]),
        "ensure_weight_tying": lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    }
    for name, config in tries.items():
        model = load(path, **({"tie_word_embeddings": True} if name == "ensure_weight_tying" else {}))
        with pytest.raises(ShardwiseError) as error:
            get_peft_model(model, config)
        found[name] = str(error.value)
        with pytest.raises(ShardwiseError):  # also for who goes on all the same
            model(input_ids=batches()[0].input_ids)
    for name, config in (("type PREFIX_TUNING", VIRTUAL["prefix"]()), ("type IA3", peft.IA3Config(target_modules=["k_proj"]))):
        with pytest.raises(ShardwiseError) as error:
            shardwise.parallelize(get_peft_model(build("llama"), config), world("tp"))
        found[f"{name} cannot become parallel"] = str(error.value)
    with pytest.raises(ShardwiseError) as error:
        get_peft_model(load(path, sequence_parallel=True), lora())
    return found | {"sequence_parallel": str(error.value)}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
def test_adapters_that_would_be_wrong_are_refused(pool2, tmp_path_factory):
    """Guards: norms, decompositions and element-wise factors of one rank's part of a weight, which have the right shapes; an
    error that comes when the weights have been changed; errors of PEFT's about sizes.
    """
    for found in pool2.run(refusals, checkpoint(tmp_path_factory, "llama"), checkpoint(tmp_path_factory, "phi3")):
        for words, said in found.items():
            assert words in said, said
