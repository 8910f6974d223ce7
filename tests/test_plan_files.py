"""Plans as files: saved, edited and loaded; and how cuts are written."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import shardwise
from shardwise import tiny
from shardwise.errors import PlanError
from shardwise.layers import Cut
from shardwise.layout import Block
from shardwise.notation import evaluate, read_cut, read_local, write_cut, write_local
from shardwise.plan import Plan, expand
from shardwise.plan.lines import patterns

SPREADS = st.sampled_from(["split", "share", "whole", "pad"])
BLOCKS = st.builds(
    lambda units, unit, spread: Block(units * unit, unit, spread), st.integers(1, 99), st.integers(1, 999), SPREADS
)
DIMS = st.none() | st.integers(0, 3)
CUTS = st.builds(Cut, st.integers(1, 4096), SPREADS, dim=DIMS) | st.builds(
    lambda blocks, times, dim: Cut(blocks=tuple(blocks) * times, dim=dim),
    st.lists(BLOCKS, min_size=1, max_size=4),
    st.sampled_from([1, 7]),
    DIMS,
)


@given(CUTS)
def test_cut_is_read_as_it_is_written(cut):
    """Guards: a cut that a file gives back as another one."""
    assert read_cut(write_cut(cut)) == cut


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("25 x (64 + 64 + 64)", Cut(blocks=(Block(4800, 192),))),
        ("16 x 128 | 256 whole", Cut(blocks=(Block(2048, 128), Block(256, spread="whole")))),
        ("heads x (3 * config.width)", Cut(blocks=(Block(96, 24),))),
        ("12 units", Cut(unit=8)),
        ("heads units shared", Cut(unit=24, spread="share")),
        ("heads times 3 x 8 | 4", Cut(blocks=(*(Block(24, 8),) * 4, Block(4)))),
        ("dim 1: 2 units", Cut(unit=48, dim=1)),
    ],
)
def test_cuts_as_people_write_them(text, cut):
    """Guards: a cut of a person's that is read as something else."""
    assert read_cut(text, 96, {"heads": 4, "config.width": 8}.__getitem__) == cut


@pytest.mark.parametrize(
    "text", ["", "4 x", "4 x 4 x 4", "4 / 3", "-4", "heads", "units of 0", "7 units", "__import__('os')", "4 ** 2"]
)
def test_what_is_no_cut_is_refused(text):
    """Guards: a slip of the pen that becomes a plan; code in a file that is run."""
    with pytest.raises(ValueError, match="'"):
        read_cut(text, 96)


@given(st.lists(st.integers(1, 999), min_size=1, max_size=8), st.integers(1, 9999) | st.none())
def test_number_is_read_as_it_is_written(values, of):
    """Guards: a head count that a file gives back as another one."""
    assert read_local(write_local(values, of)) == (tuple(values), of)
    assert evaluate("2 * (3 + 4) / 7 - 1") == 1


@given(st.sets(st.integers(0, 30), min_size=1), st.sets(st.integers(0, 2), min_size=1))
def test_patterns_name_these_layers_and_no_other(layers, experts):
    """Guards: a rule for some layers that becomes one for all."""
    family = {f"layers.{layer}.experts.{expert}.up" for layer in range(31) for expert in range(3)}
    names = [f"layers.{layer}.experts.{expert}.up" for layer in layers for expert in experts]
    found = patterns(names, family)
    assert len(found) == 1
    if "*" not in found[0]:
        assert sorted(expand(found[0])) == sorted(names)
    assert found == ["layers.*.experts.*.up"] or set(names) != family


def without_patterns(plan: Plan) -> list[object]:
    """What of a plan does not depend on how its rules were written."""
    rows = [(row.name, row.layout, row.partial, row.axis, row.aliases) for row in plan]
    return [*rows, *((row.name, row.style, row.attributes, row.options, row.region) for row in plan.modules)]


@pytest.mark.parametrize(
    ("name", "how"), [("llama", "auto"), ("mixtral", "auto"), ("gpt2", "auto"), ("gpt2", "infer"), ("deepseek_v3", "infer")]
)
def test_loaded_plan_is_the_saved_one(name, how, tmp_path):
    """Guards: a rule, a cut or a number that a file loses; a file with a row for each layer, which nobody reads."""
    model = tiny.build(name)
    plan = shardwise.plan(model, 2, how)
    plan.save(tmp_path / "plan.json")
    loaded = shardwise.plan(model, 2, tmp_path / "plan.json")
    assert without_patterns(loaded) == without_patterns(plan)
    assert loaded.to_json() == plan.to_json()
    assert len(plan.to_json().splitlines()) < 30
    assert "layers.1" not in plan.to_json()
    assert shardwise.prove(loaded, model)


def test_buffers_that_are_cut_come_back(tmp_path):
    """Guards: a table of all heads of which a file says nothing, or whose cut dim it loses."""
    model = tiny.on_meta("minimax")
    plan = shardwise.plan(model, 2)
    plan.save(tmp_path / "plan.json")
    assert plan["model.layers.0.self_attn.diagonal_decay"].layout.dim == 1
    assert without_patterns(shardwise.plan(model, 2, tmp_path / "plan.json")) == without_patterns(plan)


def test_layers_that_differ_and_dealt_experts_come_back(tmp_path):
    """Guards: a rule for one layer that becomes one for all; experts that are dealt and come back split."""
    model = tiny.on_meta("mixtral", num_hidden_layers=4)
    plan = shardwise.plan(model, 2, {"layers.1.self_attn.o_proj": "rowwise", "layers.2.mlp": "replicate"}, ep_size=4)
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert '"model.layers.{0,2-3}.self_attn.o_proj"' in text
    assert '"ep": 4' in text
    loaded = shardwise.plan(model, 2, str(tmp_path / "plan.json"))
    assert without_patterns(loaded) == without_patterns(plan)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A plan of the tiny GPT-2 for two ranks."""
    path = tmp_path / "plan.json"
    shardwise.infer_plan(tiny.build("gpt2"), 2).save(path)
    return path


def test_edited_plan_is_resolved_and_proven(saved):
    """Guards: an edit that is not seen."""
    model = tiny.build("gpt2")
    saved.write_text(saved.read_text().replace('"4 x 16 | 4 x 16 | 4 x 16"', '"12 x 16"'))
    plan = shardwise.load_plan(saved, model)
    assert plan["transformer.h.1.attn.c_attn.weight"].layout.cut((64, 192))[1] == (Block(192, 16),)
    with pytest.raises(PlanError, match=r"h\.0\.attn"):
        shardwise.prove(plan, model)


FAULTS = {
    "not there": (None, "No such file"),
    "no JSON": ("{", "it has to be a JSON object"),
    "something else": ('{"tp": 2}', 'it is not an object with "tp" and "rules"'),
    "a rule without a style": (
        '{"tp": 2, "rules": [{"pattern": "lm_head"}]}',
        'rule 1: not an object with "pattern" and "style"',
    ),
    "a word too many": ('{"tp": 2, "rules": [{"pattern": "lm_head", "style": "colwise", "cuts": ""}]}', "'cuts' means nothing"),
    "no such style": ('{"tp": 2, "rules": [{"pattern": "lm_head", "style": "colwse"}]}', "no parallel style 'colwse'"),
    "no such cut": ('{"tp": 2, "rules": [{"pattern": "lm_head", "style": "colwise", "cut": "4 of 3"}]}', "lm_head: '4 of 3'"),
    "no such module": ('{"tp": 2, "rules": [{"pattern": "head", "style": "colwise"}]}', "'head' matches no module"),
    "numbers of one rank": (
        '{"tp": 2, "rules": [{"pattern": "lm_head", "style": "replicate", "attributes": {"n": "6 of 12"}}]}',
        "has 1 numbers, and tp=2 ranks need one each",
    ),
    "blocks that don't add up": (
        '{"tp": 2, "rules": [{"pattern": "lm_head", "style": "packed_colwise", "cut": "2 x 4"}]}',
        "blocks of 8 do not add up to 127",
    ),
    "nothing cut": ('{"tp": 2, "rules": [{"pattern": "lm_head", "style": "replicate"}]}', "no rule cuts anything"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_file_is_refused(fault, tmp_path):
    """Guards: a file that is not what it should be, and a plan all the same, or an error that names nothing."""
    text, said = FAULTS[fault]
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=re.escape(said)):
        shardwise.plan(tiny.on_meta("gpt2"), 2, str(tmp_path / "plan.json"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"hidden_size": 96, "num_attention_heads": 6},
            ["h.0.mlp.c_fc: 64 x 256 in the file, 96 x 384 in the model", "and 9 more"],
        ),
        ({"n_inner": 64}, ["h.0.mlp.c_fc: 64 x 256 in the file, 64 x 64 in the model"]),
    ],
)
def test_plan_of_another_size_is_refused(options, said, saved):
    """Guards: a plan of other sizes that happens to resolve."""
    with pytest.raises(PlanError, match="is not for this GPT2LMHeadModel") as raised:
        shardwise.plan(tiny.on_meta("gpt2", **options), 2, saved)
    assert all(one in str(raised.value) for one in said)


def test_plan_with_other_heads_is_refused(tmp_path):
    """Guards: a plan for 8 heads on a model of 4, whose shapes are the same."""
    shardwise.infer_plan(tiny.build("falcon"), 2).save(tmp_path / "plan.json")
    given = json.loads((tmp_path / "plan.json").read_text())
    for rule in given["rules"]:
        if "attributes" in rule:
            rule["attributes"]["num_heads"] = "2, 2 of 4"
    (tmp_path / "plan.json").write_text(json.dumps(given))
    with pytest.raises(PlanError, match=r"self_attention.num_heads: 4 in the file, 8 in the model"):
        shardwise.plan(tiny.on_meta("falcon"), 2, tmp_path / "plan.json")


def test_file_for_other_ranks_or_models_is_refused(saved, tmp_path):
    """Guards: a plan for two ranks on four; one of another architecture."""
    with pytest.raises(PlanError, match="for tp=2, and the mesh has 4"):
        shardwise.plan(tiny.on_meta("gpt2"), 4, saved)
    with pytest.raises(PlanError, match="is not for this LlamaForCausalLM"):
        shardwise.plan(tiny.on_meta("llama"), 2, saved)
    (tmp_path / "dict.json").write_text('{"transformer.wpe": "embedding_rowwise"}')
    with pytest.raises(PlanError, match="a dict of patterns and styles"):
        shardwise.load_plan(tmp_path / "dict.json", tiny.on_meta("gpt2"))
    merged = shardwise.plan(tiny.on_meta("gpt2"), 2, str(tmp_path / "dict.json"))
    assert merged["transformer.wpe.weight"].sharded


def on_rank(model: nn.Module, path: str) -> Tensor:
    """The logits of a model that is made parallel by a file."""
    model = shardwise.parallelize(copy.deepcopy(model), plan=path)
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9).view(1, 8)).logits


def test_parallel_by_a_file(saved, threads):
    """Guards: a file that plans take, and models don't."""
    model = tiny.build("gpt2")
    with torch.no_grad():
        expected = model(input_ids=torch.arange(1, 9).view(1, 8)).logits
    for logits in threads(on_rank, 2, model, str(saved)):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
