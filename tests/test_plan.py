"""The plan: which rule holds, what is refused and how it is said, and what the table shows."""

from __future__ import annotations

import re
import time

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MixtralConfig, Phi3Config

import shardwise
from blocks import Mlp, tp_axis
from shardwise.errors import PlanError
from shardwise.layout import Packed, Replicated, Sharded
from shardwise.plan import show
from shardwise.plan.notes import notes
from shardwise.report import as_text
from shardwise.spec import Rule
from shardwise.testing import RankError

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 127,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = LlamaConfig(**TINY)


def plan_error(model: object, size: int, rules: dict[str, str] | str = "auto", **options: int) -> str:
    """The message of the `PlanError` that is raised."""
    with pytest.raises(PlanError) as caught:
        shardwise.plan(model, size, rules, **options)
    return str(caught.value)


def says(text: str, *parts: str) -> bool:
    """Whether each part is in the message; and the message offers two ways out."""
    assert [part for part in parts if part not in text] == []
    return bool(re.search(r"(?s)\n  either +.*, or\n +\S", text))


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("layers.*.mlp", "layers.0.mlp", True),
        ("layers.*.mlp", "layers.0.mlp.up", False),
        ("layers.*.mlp", "model.layers.0.mlp", False),
        ("layers.*.mlp.w1", "layers.10.mlp.w1", True),
        ("layers.*.mlp.w1", "layers.10.mlp.w2", False),
        ("layers.*.fc1", "layers.0.fc2", False),
        ("layers.*.dense_h_to_4h", "layers.0.dense_4h_to_h", False),
        ("layers.0.mlp", "layers.1.mlp", False),
        ("layers.1.mlp", "layers.11.mlp", False),
        ("*.up", "layers.0.up", False),
        ("*", "up", True),
        ("a.b", "aXb", False),
        ("", "", True),
    ],
)
def test_matching(pattern, name, matches):
    """Guards: a wildcard that eats a digit of a name (w1, fc1, 4h), more than one segment, or a dot that matches anything."""
    assert Rule(pattern, "colwise", "user").matches(name) == matches


class Digits(nn.Module):
    """Layers whose names hold digits that are not positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(8, 8), "w2": nn.Linear(8, 8), "fc1": nn.Linear(8, 8), "4h": nn.Linear(8, 8)})
            for _ in range(11)
        )


def test_digits_in_names_are_names():
    """Guards: `w1` read as `w*`, so that one rule holds for all of them, in matching or in the table's families."""
    rules = {"layers.*.w1": "colwise", "layers.*.w2": "rowwise", "layers.*.fc1": "replicate", "layers.*.4h": "colwise_rep"}
    table = shardwise.plan(Digits(), 2, rules)
    for layer in range(11):
        styles = {name: table[f"layers.{layer}.{name}.weight"].rule.style for name in ("w1", "w2", "fc1", "4h")}
        assert styles == {"w1": "colwise", "w2": "rowwise", "fc1": "replicate", "4h": "colwise_rep"}
    above, *rows = [line.split() for line in str(table).splitlines() if line.startswith(("layers.*", "  "))]
    assert above == ["layers.*", "x", "11"]
    assert [row[0] for row in rows if not row[0].endswith(".bias")] == ["w1", "w2", "fc1", "4h"]


def test_precedence():
    """Guards: a correction of ours over the user's rule, or the model's rule over a correction."""
    name = "model.layers.0.mlp.gate_up_proj.weight"
    phi = Phi3Config(**TINY)
    ours = shardwise.plan(phi, 2)[name]
    assert (ours.rule.source, ours.rule.style) == ("shardwise", "packed_colwise")
    assert isinstance(ours.layout, Packed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(phi)
    assert model._tp_plan["model.layers.*.mlp.gate_up_proj"] == "colwise_gather_output"  # what the correction went over
    yours = shardwise.plan(
        phi, 2, {"layers.*.mlp.gate_up_proj": "colwise_gather_output", "layers.*.mlp.down_proj": "rowwise_rep"}
    )
    assert (yours[name].rule.source, yours[name].rule.style) == ("user", "colwise_gather_output")
    assert isinstance(yours[name].layout, Sharded)
    assert yours["model.layers.1.self_attn.qkv_proj.weight"].rule.source == "shardwise"


def test_later_rules_hold():
    """Guards: a user's second, narrower rule that is lost against the first."""
    table = shardwise.plan(LLAMA, 2, {"layers.*.mlp.up_proj": "colwise", "model.layers.1.mlp.up_proj": "replicate"})
    assert isinstance(table["model.layers.0.mlp.up_proj.weight"].layout, Sharded)
    assert isinstance(table["model.layers.1.mlp.up_proj.weight"].layout, Replicated)


def test_rule_that_matches_nothing():
    """Guards: a misspelt rule that is ignored, and the matrix that it meant left whole."""
    text = plan_error(LLAMA, 2, {"layers.*.self_attn.q_porj": "colwise"})
    for part in (
        "'layers.*.self_attn.q_porj'",
        "no module",
        "(yours)",
        "model.layers.*.self_attn.q_proj",
        "exactly one segment",
    ):
        assert part in text
    assert "perhaps" not in plan_error(LLAMA, 2, {"xyz.qqq.jjj": "colwise"})


def test_unknown_style():
    """Guards: a misspelt style that is ignored; in the model's own plan too."""
    text = plan_error(LLAMA, 2, {"layers.*.self_attn.q_proj": "colwse"})
    assert says(text, "'colwse'", "layers.*.self_attn.q_proj", "colwise, colwise_gather_output", 'register_style("colwse"')


@pytest.mark.parametrize(
    ("target", "style", "problem"),
    [
        ("layers.*.input_layernorm", "colwise", "LlamaRMSNorm is not a linear layer"),
        ("layers.*.mlp.act_fn", "rowwise", "SiLUActivation is not a linear layer"),
        ("embed_tokens", "rowwise", "Embedding is not a linear layer"),
        ("layers.*.mlp.up_proj", "embedding_rowwise", "Linear is not an embedding"),
        ("layers.*.mlp", "ep_dispatch_experts", "LlamaMLP does not say how many experts"),
    ],
)
def test_style_that_cannot_be_applied(target, style, problem):
    """Guards: a style on a module that it does not fit, found in the first forward, or never."""
    text = plan_error(LLAMA, 2, {target: style})
    assert says(text, problem, f"{target}: {style}", "(yours)", '": "replicate"')
    assert text.startswith("model." + target.replace("*", "0"))


def test_projections_that_are_cut_differently():
    """Guards: logits that are wrong by tenths without an error, where k and v stay whole beside local queries."""
    rules = {"layers.*.self_attn.k_proj": "replicate", "layers.*.self_attn.v_proj": "replicate"}
    assert says(plan_error(LLAMA, 2, rules), "model.layers.0.self_attn", "q_proj", "k_proj, v_proj whole", "(yours)")
    rules |= {"layers.*.self_attn.q_proj": "replicate", "layers.*.self_attn.o_proj": "replicate"}
    assert not shardwise.plan(LLAMA, 2, rules)["model.layers.0.self_attn.q_proj.weight"].sharded


@pytest.mark.parametrize(("heads", "kv", "size"), [(6, 2, 4), (8, 2, 3), (8, 2, 16)])
def test_heads_that_do_not_divide(heads, kv, size):
    """Guards: a `view` error in the first forward."""
    text = plan_error(LlamaConfig(**{**TINY, "hidden_size": 48, "num_attention_heads": heads, "num_key_value_heads": kv}), size)
    assert says(
        text,
        "model.layers.0.self_attn.q_proj",
        f"{heads} query heads and {kv} KV heads",
        f"tp={size}",
        "model.layers.*.self_attn.q_proj: colwise",
        "from the model's own plan",
        "a tp_size of 1, 2, ",
        "replicate",
    )


def test_dims_that_do_not_divide():
    """Guards: a rank without a row."""
    text = plan_error(nn.ModuleDict({"mlp": Mlp(6, 7)}), 8, {"mlp.up": "colwise", "mlp.down": "rowwise"})
    assert says(
        text, "mlp.up.weight", "cannot be split over tp=8", "(7, 6)", "mlp.up: colwise", "tp_size", '"mlp.up": "replicate"'
    )


def test_large_matrices_without_a_rule():
    """Guards: experts, or a head, that every rank keeps whole because no rule names them."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "experts": nn.ModuleList(nn.Linear(8, 16) for _ in range(4))})
    text = plan_error(model, 2, {"a": "colwise"})
    assert says(text, "experts.*.weight", "MiB", "% of the model", '"experts.*": "replicate"')
    assert "a.weight" not in text
    assert len(shardwise.plan(model, 2, {"a": "colwise", "experts.*": "replicate"})) == 10
    assert len(shardwise.plan(model, 2, {"a": "colwise", "experts.*": "colwise"})) == 10


def test_nothing_cut():
    """Guards: a plan that leaves every rank the whole model."""
    assert says(
        plan_error(nn.Sequential(nn.Linear(4, 4)), 2),
        "Sequential",
        "no rule cuts anything",
        "80% of the model",
    )
    assert says(plan_error(nn.Sequential(nn.Linear(4, 4)), 2, {"0": "replicate"}), "no rule cuts anything")
    assert len(shardwise.plan(nn.Sequential(nn.Linear(4, 4)), 1, {"0": "replicate"})) == 2


def test_tied_parameters_cut_differently():
    """Guards: one of two tied names whose rule wins in silence: logits too wide, or an embedding of other rows."""
    tied = LlamaConfig(**TINY, tie_word_embeddings=True)
    text = plan_error(tied, 2, {"embed_tokens": "embedding_colwise"})
    assert says(
        text, "model.embed_tokens.weight and lm_head.weight", "dim 1", "dim 0", "(yours)", "from the model's own plan", "untie"
    )
    row = shardwise.plan(tied, 2)["lm_head.weight"]
    assert (row.name, row.aliases) == ("model.embed_tokens.weight", ("lm_head.weight",))


@pytest.mark.parametrize("size", [0, -2])
def test_sizes_that_are_none(size):
    """Guards: an IndexError."""
    assert f"tp_size={size}" in plan_error(LLAMA, size)


def test_what_is_no_plan():
    """Guards: a word that is taken for no rules at all."""
    assert says(plan_error(LLAMA, 2, "tp"), "tp_plan='tp'", '"auto"')
    assert says(plan_error(LLAMA, 4, ep_size=3), "ep_size=3", "tp_size=4")


def _apply(model: nn.Module, table: shardwise.Plan) -> None:
    before = {name: (tensor, tensor.clone()) for name, tensor in model.named_parameters()}
    try:
        shardwise.parallelize(model, tp_axis(), plan=table)
    finally:
        now = dict(model.named_parameters())
        assert all(now[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items())


def test_plan_of_another_size_or_model(threads):
    """Guards: a table applied where its shapes do not hold, or half of it before that is found."""
    rules = {"up": "colwise", "down": "rowwise"}
    with pytest.raises(RankError, match=r"tp=4.*mesh has 2 ranks"):
        threads(_apply, 2, Mlp(8, 8), shardwise.plan(Mlp(8, 8), 4, rules))
    with pytest.raises(RankError, match="another model"):
        threads(_apply, 2, Mlp(8, 8), shardwise.plan(Mlp(8, 16), 2, rules))
    with pytest.raises(RankError, match="another model"):
        threads(_apply, 2, Mlp(8, 8), shardwise.plan(nn.Sequential(nn.Linear(8, 8)), 2, {"0": "colwise"}))


def test_table():
    """Guards: a row, a shape or a number of bytes that is not what a rank will hold."""
    table = shardwise.plan(LLAMA, 2)
    model = AutoModelForCausalLM.from_config(LLAMA)
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    assert [row.name for row in table] == list(named)
    assert len(table) == len(named)
    assert table.full_bytes == sum(tensor.nbytes for tensor in named.values())
    for rank in range(2):
        shards = {row.name: row.layout.shard(named[row.name].detach(), rank, 2) for row in table}
        assert table.local_bytes(rank) == sum(shard.nbytes for shard in shards.values())
        assert all(tuple(shards[row.name].shape) == row.local_shape(rank, 2) for row in table)
    assert "lm_head.weight" in table
    assert "lm_head.bias" not in table


def cells_of(text: str) -> dict[str, list[str]]:
    """The cells of each row, of a page or of a text, by the parameter."""
    if text.startswith("<!doctype html>"):
        rows = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in text.splitlines()]
    else:
        rows = [re.split(r"(?<! x) +(?!x )", line.strip()) for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


@pytest.mark.parametrize("shown", [str, shardwise.Plan.to_html])
def test_what_is_shown(shown):
    """Guards: a table without full or local shapes, styles, sources or bytes; an edge that cuts names off."""
    text = shown(shardwise.plan(LLAMA, 2, {"layers.*.mlp.up_proj": "colwise"}))
    rows = cells_of(text)
    assert rows["model.embed_tokens"][:5] == ["embedding_rowwise", "model", "127 x 64", "64 x 64", "0.02"]
    assert " ".join(rows["mlp.up_proj"]) == "colwise user 96 x 64 48 x 64 0.02 dim 0"
    assert rows["self_attn.q_proj"][1] == "model"
    assert rows["model.norm"][-1] == "whole"
    assert "model.layers.*  x 2" in text
    assert "over 2 ranks" in text
    assert "0.14 MiB on the fullest rank, of 0.28 MiB" in text


@pytest.mark.parametrize("width", [100, 128])
def test_it_fits(width):
    """Guards: a table that a terminal of this width would fold into unreadable lines, and names or shapes cut off."""
    config = DeepseekV3Config(dtype=torch.bfloat16)
    text = as_text(*show.text(shardwise.plan(config, 8), width), width=width)
    assert max(map(len, text.splitlines())) <= width
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for name, row in shardwise.plan(config, 8).families.items():
        shown = rows[name.rpartition(".*.")[2].removesuffix(".weight")]
        assert " x ".join(map(str, row[0].shape)) in shown
        assert " x ".join(map(str, row[0].local_shape(0, 8))) in shown


def test_ours_are_named():
    """Guards: a correction of ours shown as the model's own rule."""
    assert cells_of(str(shardwise.plan(Phi3Config(**TINY), 2)))["mlp.gate_up_proj"][:2] == ["packed_colwise", "ours"]


def test_notes():
    """Guards: KV heads that several ranks keep, and large matrices that stay whole, without a word; words where all is well."""
    assert notes(shardwise.plan(LLAMA, 2)) == []
    shared, *_ = notes(shardwise.plan(LLAMA, 4))[-1:]
    assert "self_attn.k_proj.weight and model.layers.*.self_attn.v_proj.weight: 2 heads on 4 ranks" in shared
    assert "kept by 2" in shared
    whole = notes(shardwise.plan(LLAMA, 2, {"layers.*.mlp": "replicate"}))
    assert re.search(r"rank holds 1\.\d\d times its part", whole[0])
    assert any("layers.*.mlp: whole on every rank by a rule of the user (replicate): 0.14 MiB" in note for note in whole)


LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    dtype=torch.bfloat16,
    bos_token_id=128000,
    eos_token_id=128001,
)


@pytest.mark.parametrize(
    ("config", "gigabytes", "parts"),
    [
        (LLAMA_3_8B, 16, 1.15),
        (MixtralConfig(dtype=torch.bfloat16), 93, 1.15),
        (DeepseekV3Config(dtype=torch.bfloat16), 1342, 1.15),
    ],
    ids=["llama-3-8B", "mixtral-8x7B", "deepseek-v3"],
)
def test_real_sizes_from_a_config(config, gigabytes, parts):
    """Guards: a plan that leaves large parts whole on each rank, or that allocates the model to make it."""
    start = time.monotonic()
    resident = _resident()
    table = shardwise.plan(config, 8)
    text = str(table)
    taken, growth = time.monotonic() - start, _resident() - resident
    assert round(table.full_bytes / 1e9) == gigabytes
    assert max(map(table.local_bytes, range(8))) <= parts * table.full_bytes / 8
    assert growth < 200e6
    assert taken < 30
    assert "over 8 ranks" in text


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except FileNotFoundError:
        return 0
