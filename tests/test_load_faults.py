"""Checkpoints that do not fit, and those that do in another form, through the public `from_pretrained` on two processes.

Whatever only one rank sees: both raise, soon, and the processes go on.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import shardwise
from llamas import TINY
from shardwise.errors import ShardwiseError
from shardwise.model_state import required_state

MODELS: dict[str, dict[str, object]] = {"llama": {}, "phi3": {}, "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}
IDS = torch.arange(3, 27).view(2, 12)
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each type, in one file; llama also in several, in bfloat16, and without its head."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for kind, sizes in MODELS.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY, **sizes))
        model.save_pretrained(root / kind)
        if kind == "llama":
            model.save_pretrained(root / "several", max_shard_size="20KB")
            model.model.save_pretrained(root / "base")
            model.to(torch.bfloat16).save_pretrained(root / "bfloat16")
    return {path.name: path for path in root.iterdir()}


def _attempt(paths: list[str], auto: str, options: dict) -> tuple[str, str, float]:
    start = time.monotonic()
    try:
        getattr(shardwise, auto).from_pretrained(paths[dist.get_rank()], tp_plan="auto", **options)
    except (ShardwiseError, OSError, ValueError) as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "loaded", "", time.monotonic() - start


def _logits(path: str, auto: str, options: dict) -> tuple[Tensor, set[torch.dtype]]:
    torch.manual_seed(dist.get_rank())
    model = getattr(shardwise, auto).from_pretrained(path, tp_plan="auto", **options)
    output = model(IDS)
    return output[0].detach().float(), {parameter.dtype for parameter in model.parameters()}


def changed(checkpoint: Path, change: Change, tmp_path: Path) -> Path:
    """A copy of `checkpoint`, changed."""
    path = tmp_path / "changed"
    shutil.copytree(checkpoint, path)
    change(path)
    return path


def edit(*changes: Callable[[dict[str, Tensor]], object]) -> Change:
    """Change the tensors of the single file."""

    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        for one in changes:
            one(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return change


def drop(*keys: str) -> Change:
    """Without these keys."""
    return edit(lambda tensors: [tensors.pop(key) for key in keys])


def put(key: str, tensor: Tensor) -> Change:
    """With this tensor."""
    return edit(lambda tensors: tensors.update({key: tensor}))


def configured(**values: object) -> Change:
    """With other values in its config."""

    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | values))

    return change


def truncated(path: Path) -> None:
    """Without the second half."""
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lost_file(path: Path) -> None:
    """Without one of several files."""
    min(path.glob("model-*.safetensors")).unlink()


UP, QKV = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.qkv_proj.weight"
W1 = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
EXPERT_3 = [f"model.layers.0.block_sparse_moe.experts.3.w{number}.weight" for number in (1, 2, 3)]
FAULTS: dict[str, tuple[str, Change, str]] = {
    "missing key": ("llama", drop(UP), rf"missing +{UP}: \[48, 32\]"),
    "extra key": ("llama", put("model.layers.7.x", torch.ones(2)), r"unexpected +model\.layers\.7\.x"),
    "wrong shape": ("llama", put(UP, torch.ones(44, 32)), rf"{UP}: found \[44, 32\], expected \[48, 32\]"),
    "wrong shape of fused qkv": ("phi3", put(QKV, torch.ones(60, 32)), rf"{QKV}: found \[60, 32\], expected \[64, 32\]"),
    "wrong shape of one expert": ("mixtral", put(W1, torch.ones(44, 32)), rf"{re.escape(W1)}.*\[44, 32\]"),
    "missing expert": ("mixtral", drop(*EXPERT_3), rf"\[3, 32, 48\], expected \[4, 32, 48\].*{re.escape(EXPERT_3[0])}"),
    "missing part of an expert": ("mixtral", drop(W1), re.escape(W1)),
    "int8 in a float parameter": ("llama", put(UP, torch.ones(48, 32, dtype=torch.int8)), rf"dtype +{UP}.*int8"),
    "truncated file": ("llama", truncated, r"model\.safetensors: the file is truncated"),
    "empty file": ("llama", lambda path: (path / "model.safetensors").write_bytes(b""), "the file is empty"),
    "lost file": ("several", lost_file, r"model-00001-of-\d+\.safetensors is missing.*index"),
    "quantized": ("llama", configured(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "quantized"),
    "no weights": ("llama", lambda path: (path / "model.safetensors").unlink(), "there is no checkpoint"),
    "no directory": ("llama", shutil.rmtree, "changed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault, checkpoints, pool2, tmp_path):
    """Guards: a checkpoint that does not fit and is loaded, cut or initialised in silence; a message without key or file."""
    kind, change, says = FAULTS[fault]
    path = changed(checkpoints[kind], change, tmp_path)
    for name, text, seconds in pool2.run(_attempt, [str(path)] * 2, "AutoModelForCausalLM", {}):
        assert name in ("CheckpointError", "OSError")
        assert name == "CheckpointError" or fault == "no directory"
        assert re.search(f"(?s){says}", text), text
        assert seconds < 10


@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize("fault", ["missing key", "truncated file", "lost file", "no weights", "quantized", "no directory"])
def test_faults_that_one_rank_sees(fault, faulty, checkpoints, pool2, tmp_path):
    """Guards: a rank whose disk is broken raises, and the others wait for it for ever, or return a model."""
    kind, change, says = FAULTS[fault]
    paths = [str(checkpoints[kind])] * 2
    paths[faulty] = str(changed(checkpoints[kind], change, tmp_path))
    results = pool2.run(_attempt, paths, "AutoModelForCausalLM", {}, timeout=30.0)
    assert results[faulty][0] in ("CheckpointError", "OSError")
    assert re.search(f"(?s){says}", results[faulty][1])
    assert results[1 - faulty][0] == "MismatchError"
    assert f"failed on rank {faulty}" in results[1 - faulty][1]
    good = [str(checkpoints["llama"])] * 2
    assert [name for name, *_ in pool2.run(_attempt, good, "AutoModelForCausalLM", {})] == ["loaded"] * 2


def reference(path: Path, auto: type = AutoModelForCausalLM, **options: object) -> Tensor:
    """What plain transformers makes of it."""
    with torch.no_grad():
        return auto.from_pretrained(path, **options)(IDS)[0].float()


@pytest.mark.parametrize("stored", ["llama", "bfloat16", "several"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto", None])
def test_dtypes(stored, dtype, checkpoints, pool2):
    """Guards: a cast that is left out, or made twice; an index whose files are not all read."""
    options = {} if dtype is None else {"dtype": dtype}
    wanted = dtype if isinstance(dtype, torch.dtype) else (torch.bfloat16 if stored == "bfloat16" else torch.float32)
    expected = reference(checkpoints[stored], dtype=wanted)
    for logits, dtypes in pool2.run(_logits, str(checkpoints[stored]), "AutoModelForCausalLM", options):
        assert dtypes == {wanted}
        tolerance = 2e-2 if wanted == torch.bfloat16 else 1e-5
        assert (logits - expected).abs().max() < tolerance


def _by_a_plan(path: str, dtype: torch.dtype) -> set[torch.dtype]:
    table = shardwise.plan(AutoConfig.from_pretrained(path), 2)
    model = shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan=table, dtype=dtype)
    plan = required_state(model).plan
    return {model.dtype, *(p.dtype for p in model.parameters()), *(row.dtype for row in plan if not row.buffer)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", ["llama", "bfloat16"])
def test_dtype_beside_a_plan(stored, dtype, checkpoints, pool2):
    """Guards: a plan that was made of a config, whose dtype goes before the one that was asked for: twice the memory."""
    assert pool2.run(_by_a_plan, str(checkpoints[stored]), dtype) == [{dtype}] * 2


def test_base_model_from_a_whole_checkpoint(checkpoints, pool2):
    """Guards: a head without a place that is an error where transformers takes it, or a base whose names are not found."""
    expected = reference(checkpoints["llama"], AutoModel)
    for options in ({}, {"dtype": torch.float32}):
        for hidden, _ in pool2.run(_quiet_logits, str(checkpoints["llama"]), "AutoModel", options):
            assert (hidden - expected).abs().max() < 1e-5


def test_whole_model_from_a_base_checkpoint(checkpoints, pool2):
    """Guards: a new head that is another one on each rank, so that logits are put together from two models."""
    first, second = pool2.run(_quiet_logits, str(checkpoints["base"]), "AutoModelForCausalLM", {})
    assert torch.equal(first[0], second[0])
    assert first[0].std() > 0


def _quiet_logits(path: str, auto: str, options: dict) -> tuple[Tensor, set[torch.dtype]]:
    with pytest.warns(UserWarning, match="newly_initialised|left_out"):
        return _logits(path, auto, options)


def _info(path: str, auto: str, options: dict) -> dict[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(shardwise, auto).from_pretrained(path, output_loading_info=True, **options)[1]


ALLOWED: dict[str, tuple[str, Change, str, dict[str, object]]] = {
    "head of a base": ("base", lambda path: None, "AutoModelForCausalLM", {}),
    "base of a whole": ("llama", lambda path: None, "AutoModel", {}),
    "another shape": ("llama", put(UP, torch.ones(44, 32)), "AutoModelForCausalLM", {"ignore_mismatched_sizes": True}),
    "gaps": ("llama", edit(lambda t: t.update({"extra.key": t.pop(UP)})), "AutoModelForCausalLM", {"strict": False}),
    "nothing": ("llama", lambda path: None, "AutoModelForCausalLM", {}),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_loading_info_is_that_of_transformers(case, checkpoints, pool2, tmp_path):
    """Guards: a report of nothing missing, unexpected or of another shape, where something is; a single process that can't
    give one.
    """
    kind, change, auto, options = ALLOWED[case]
    path = str(changed(checkpoints[kind], change, tmp_path))
    plain = {name: value for name, value in options.items() if name != "strict"}
    _, expected = getattr(transformers, auto).from_pretrained(path, output_loading_info=True, **plain)
    assert any(expected.values()) == (case != "nothing")
    for sizes in ({}, {"tp_size": 1}):
        for info in pool2.run(_info, path, auto, {"tp_plan": "auto", **sizes, **options}):
            assert info == expected


def _lax(path: str) -> tuple[Tensor, list[str]]:
    torch.manual_seed(dist.get_rank())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = shardwise.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", strict=False)
    return model(IDS).logits.detach(), [str(warning.message) for warning in caught]


def test_gaps_that_are_allowed_by_name(checkpoints, pool2, tmp_path):
    """Guards: a checkpoint with a key too many that can be loaded in no way; new values that differ between ranks, or that
    nobody is told of.
    """
    path = changed(checkpoints["llama"], edit(lambda t: t.update({"extra.key": t.pop(UP)})), tmp_path)
    results = pool2.run(_lax, str(path))
    assert torch.equal(results[0][0], results[1][0])
    for _, (said,) in results:
        assert re.search(rf"(?s)newly_initialised +{UP}.*left_out +extra\.key", said), said
    (_, text, _), _ = pool2.run(_attempt, [str(path)] * 2, "AutoModelForCausalLM", {})
    assert "strict=False" in text


REFUSED = {
    "device_map": (0, "its own device"),
    "quantization_config": ({"load_in_8bit": True}, "not quantized"),
    "gguf_file": ("model.gguf", "safetensors"),
    "state_dict": ({}, "parallelize"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_mean_another_way_of_placing_weights(option, checkpoints, pool2):
    """Guards: an option of transformers' that is ignored (device 0, which is false), or refused for another one's reason."""
    value, reason = REFUSED[option]
    for name, text, _ in pool2.run(_attempt, [str(checkpoints["llama"])] * 2, "AutoModelForCausalLM", {option: value}):
        assert (name, option in text) == ("ShardwiseError", True)
        assert re.search(f"why .*{reason}", text)
