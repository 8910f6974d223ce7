"""Models of transformers made from lazy tensors: bitwise the same, nothing read, and nothing wrong in silence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from llamas import TINY
from shardwise.checkpoint import find_checkpoint, open_checkpoint
from shardwise.errors import CheckpointError
from shardwise.hf import attach_generation_config, load_lazily, resolve_model_class
from shardwise.hf.checks import missing_in_rows
from shardwise.lazy import Box, LazyTensor, read

COMMON = {**TINY, "max_position_embeddings": 64, "eos_token_id": 2}

EXPERTS_OF_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MODELS: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8},  # tied
    "phi3": {},  # fused qkv and gate_up
    "starcoder2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "deepseek_v3": {
        **EXPERTS_OF_DEEPSEEK,
        **LATENT,
    },
}


def _save(
    directory: Path, kind: str, auto: type = AutoModelForCausalLM, dtype: torch.dtype = torch.float32, **config: object
) -> None:
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **{**COMMON, **MODELS[kind], **config})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)  # norms of ones would hide a mistake
    model.save_pretrained(directory, max_shard_size=config.get("max_shard_size", "5GB"))


def _load(directory: Path, auto: type = AutoModelForCausalLM, **options: object) -> PreTrainedModel:
    found = find_checkpoint(directory)
    model_class, config = resolve_model_class(auto, AutoConfig.from_pretrained(directory))
    return load_lazily(model_class, config, open_checkpoint(found.files, found.index), **options)[0]


def _edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _boxes(shape: torch.Size) -> Iterator[Box]:
    yield tuple((0, length) for length in shape)
    for dim, length in enumerate(shape):
        if length > 1:
            yield tuple((length // 3, length // 3 + length // 2) if i == dim else (0, n) for i, n in enumerate(shape))


def _named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


@pytest.mark.parametrize(
    ("stored", "dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("kind", MODELS)
def test_equals_transformers_and_reads_nothing_before(
    kind: str, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a weight that differs in any bit from transformers' own, a broken tie, or one that is read while converting."""
    _save(tmp_path, kind, dtype=stored, max_shard_size="20KB")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr("shardwise.checkpoint.FileSource.read", None)
        model = _load(tmp_path, dtype=dtype)
    attach_generation_config(model, tmp_path)
    assert type(model) is type(reference)
    assert not model.training
    assert model.config.to_dict() == reference.config.to_dict()
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    expected, found = _named(reference), _named(model)
    assert list(expected) == list(found)
    assert len({id(t) for t in expected.values()}) == len({id(t) for t in found.values()})
    for name, tensor in expected.items():
        assert isinstance(found[name], LazyTensor) == (name in reference.state_dict()), name
        assert (tensor.dtype, tensor.requires_grad) == (found[name].dtype, found[name].requires_grad), name
        for box in _boxes(tensor.shape):
            assert torch.equal(read(found[name], box), tensor.detach()[tuple(slice(*bounds) for bounds in box)]), (name, box)


UP = "model.layers.0.mlp.up_proj.weight"
EXPERTS = "model.layers.0.block_sparse_moe.experts."


def _drop(*keys: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(key) for key in keys]


def _add(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: tensor})


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("llama", _add(UP, torch.zeros(3, 32)), rf"shape +{UP}: found \[3, 32\], expected \[48, 32\].*model\.safetensors"),
        ("llama", _drop(UP), rf"missing +{UP}: \[48, 32\]"),
        ("llama", _add("model.layers.7.x", torch.ones(2)), r"unexpected +model\.layers\.7\.x \(model\.safetensors\) \[2\]"),
        (
            "llama",
            _add("model.norm.weight", torch.ones(32, dtype=torch.int8)),
            r"dtype +model\.norm\.weight: expected float32, found",
        ),
        ("gemma2", _drop("model.embed_tokens.weight"), r"missing +lm_head\.weight.*model\.embed_tokens\.weight"),
        ("mixtral", _add(f"{EXPERTS}2.w1.weight", torch.zeros(3, 32)), rf"tensors +{EXPERTS}2\.w1\.weight \(.*?\): \[3, 32\]"),
        ("mixtral", _drop(f"{EXPERTS}2.w1.weight"), rf"not_there +{EXPERTS}2\.w1\.weight"),
        (
            "mixtral",
            _drop(*(f"{EXPERTS}3.w{i}.weight" for i in (1, 2, 3))),
            rf"found \[3, 32, 48\], expected \[4, 32, 48\].*not_there +{EXPERTS}3\.w1\.weight",
        ),
        ("mixtral", _add(f"{EXPERTS}4.w2.weight", torch.zeros(32, 48)), r"found \[5, 32, 48\], expected \[4, 32, 48\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    kind: str, change: Callable[[dict[str, Tensor]], object], says: str, tmp_path: Path
) -> None:
    """Guards: a wrong, missing or extra tensor, or one expert of many, that is loaded, dropped or initialised in silence."""
    _save(tmp_path, kind)
    _load(tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=f"(?s){says}"):
        _load(tmp_path)


def test_numbers_left_out_of_a_row() -> None:
    """Guards: a missing expert reported only as a stack that is one too short."""
    keys = {f"layers.{layer}.experts.{n}.{w}" for layer in (1, 2) for n in range(3) for w in ("a", "b")}
    assert missing_in_rows(keys, keys) == set()
    for lost in ("layers.1.experts.1.a", "layers.2.experts.2.b"):
        assert missing_in_rows(keys - {lost}, keys - {lost}) == {lost}


def test_another_head_is_newly_initialised_on_purpose_only(tmp_path: Path) -> None:
    """Guards: a new head that differs between ranks, or nobody was told of; and a lost weight of the base taken for a head."""
    _save(tmp_path, "llama")
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"(?s)LlamaForCausalLM.*newly_initialised +score\.weight.*left_out +lm_head\.weight"):
        first = _load(tmp_path, AutoModelForSequenceClassification, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    with pytest.warns(UserWarning, match="newly_initialised"):
        second = _load(tmp_path, AutoModelForSequenceClassification, seed=5)
    assert torch.equal(first.score.weight, second.score.weight)
    with pytest.warns(UserWarning, match=r"left_out +lm_head\.weight"):
        assert isinstance(_load(tmp_path, AutoModel).norm.weight, LazyTensor)
    _edit(tmp_path, _drop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"missing +norm\.weight"):
        _load(tmp_path, AutoModel)


def test_other_shapes_are_initialised_when_asked_for(tmp_path: Path) -> None:
    """Guards: `ignore_mismatched_sizes` that does nothing, or that says nothing."""
    _save(tmp_path, "llama")
    _edit(tmp_path, _add("lm_head.weight", torch.zeros(3, 32)))
    with pytest.warns(UserWarning, match=r"newly_initialised +lm_head\.weight"):
        assert type(_load(tmp_path, ignore_mismatched_sizes=True).lm_head.weight) is nn.Parameter


@pytest.mark.parametrize("present", ["source", "target", "both", "different"])
def test_ties(present: str, tmp_path: Path) -> None:
    """Guards: tied weights that come apart, or untied ones that are tied, by which of the keys the checkpoint has."""
    _save(tmp_path, "gemma2")
    source, target = "model.embed_tokens.weight", "lm_head.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[target] = tensors[source] + (present == "different")
        for key in {"source": [target], "target": [source]}.get(present, []):
            del tensors[key]

    _edit(tmp_path, change)
    model = _load(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (present != "different")


def test_loading_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a progress bar for nothing, a report that contradicts ours; or either lost for plain transformers afterwards."""
    _save(tmp_path, "llama")
    capfd.readouterr()
    with pytest.warns(UserWarning, match="newly_initialised"):
        _load(tmp_path, AutoModelForSequenceClassification)
    assert capfd.readouterr() == ("", "")
    assert "LOAD REPORT" not in caplog.text
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert "Loading weights" in capfd.readouterr().err
    assert "LOAD REPORT" in caplog.text


def test_quantized_checkpoints_are_refused_by_name() -> None:
    """Guards: packed integers loaded as weights."""
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"(?s)llama: a quantized checkpoint.*gptq"):
        resolve_model_class(AutoModelForCausalLM, config)


def test_classes_are_those_of_transformers() -> None:
    """Guards: a composite config given to a text-only model, which expects the text part of it."""
    composite = AutoConfig.for_model("mllama")
    model_class, config = resolve_model_class(AutoModelForCausalLM, composite)
    assert config is composite.text_config
    assert model_class.config_class is type(config)
    with pytest.raises(ValueError, match="no model of type vit"):
        resolve_model_class(AutoModelForCausalLM, AutoConfig.for_model("vit"))
    assert resolve_model_class(model_class, config) == (model_class, config)


def test_generation_config_of_old_checkpoints(tmp_path: Path) -> None:
    """Guards: sampling settings that an old checkpoint keeps in config.json lost, or those of generation_config.json."""
    _save(tmp_path, "llama")
    GenerationConfig(temperature=0.5, do_sample=True).save_pretrained(tmp_path)
    model = _load(tmp_path)
    attach_generation_config(model, tmp_path)
    assert model.generation_config.temperature == 0.5
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_length": 77}))
    attach_generation_config(model, tmp_path)
    assert model.generation_config.max_length == 77
    assert model.generation_config._from_model_config  # or transformers takes the old settings for the user's own


def test_config_is_left_alone(tmp_path: Path) -> None:
    """Guards: the caller's config changed by loading, or the model forgetting where it came from."""
    _save(tmp_path, "llama")
    config: PreTrainedConfig = AutoConfig.from_pretrained(tmp_path)
    before = config.to_dict()
    model, _ = load_lazily(
        resolve_model_class(AutoModelForCausalLM, config)[0], config, open_checkpoint(find_checkpoint(tmp_path).files)
    )
    assert config.to_dict() == before
    assert model.name_or_path == model.config.name_or_path == str(tmp_path)
