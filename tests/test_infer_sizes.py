"""Inference at real sizes: one layer of each kind, without the large weights, and the proof beside the one with weights."""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

import shardwise
from parity import types
from shardwise import hf
from shardwise.errors import PlanError
from shardwise.hf import kinds
from shardwise.infer import infer
from shardwise.infer.blocks import islands_of
from shardwise.infer.feeds import floats
from shardwise.infer.given import Given
from shardwise.infer.probe import Probe
from shardwise.infer.products import ValuesNeeded
from shardwise.infer.subject import subject
from shardwise.infer.trace import Trace
from shardwise.layers import Cut
from shardwise.layout import Block, Sharded
from shardwise.plan import Plan
from shardwise.resolve import resolve
from shardwise.spec import Rule

LARGE: dict[str, dict[str, object]] = {
    "llama": {},
    "gpt2": {"n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024},
    "falcon": {},
    "mixtral": {},
}
"""Types with configs of the sizes that they are used at; that of falcon has 71 heads, which two ranks share unevenly."""


@pytest.mark.parametrize("name", list(LARGE))
def test_plan_of_a_large_config(name):
    """Guards: billions of elements allocated, or minutes of probing; layers that have no rules; heads that are whole. From
    the config alone, through the public function.
    """
    config = AutoConfig.for_model(name, **LARGE[name])
    started = time.process_time()
    plan = shardwise.plan(config, 2, "infer")
    assert time.process_time() - started < 20  # some 2 where it was measured
    body = [row for row in plan if len(row.shape) > 1 and not row.buffer and row.bytes > 2**22]
    whole = {row.name for row in body if not row.sharded}
    assert whole <= {"transformer.wpe.weight"}
    layers = config.num_hidden_layers
    assert {len(rows) for rows in plan.families.values() if len(rows) > 1} <= {layers, layers * 2, 2 * layers + 1}
    assert any("*" in row.rule.pattern for row in plan if row.rule)


def shrunk(monkeypatch: pytest.MonkeyPatch, elements: int = 256) -> None:
    """Tiny models as if they were large: weights of `elements` have no values."""
    for module in ("shardwise.hf.specimen", "shardwise.infer.values", "shardwise.infer.subject"):
        monkeypatch.setattr(f"{module}.LARGE_MODEL", 1000, raising=False)
        monkeypatch.setattr(f"{module}.LARGE_WEIGHT", elements, raising=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "falcon", "deepseek_v3"])
def test_same_plan_without_the_weights(name, monkeypatch):
    """Guards: a proof without weights that passes what the one with them refuses, or the other way round: of heads, of one KV
    head for all, of latents, of experts, of biases, of embeddings.
    """
    model = types.build(name)
    expected = infer(model, 2)
    shrunk(monkeypatch)
    found = infer(model, 2)
    assert {p.is_meta for p in subject(model, None).model.parameters()} == {True, False}
    assert "given" in found.proof.tried
    assert found.plan == expected.plan
    assert found.proof.outputs < 1e-5 > expected.proof.outputs


def rules(**changed: Rule | None) -> list[Rule]:
    """The rules for the attention and the MLP of a tiny GPT-2, as they should be but for those `changed`."""
    attn, mlp = "transformer.h.*.attn", "transformer.h.*.mlp"
    right = {
        "fused": Rule(f"{attn}.c_attn", "packed_colwise", "user", Cut(blocks=(Block(64, 16),) * 3)),
        "output": Rule(f"{attn}.c_proj", "rowwise", "user", Cut(unit=16)),
        "numbers": Rule(attn, "local_params", "user", attributes={"split_size": (32, 32), "num_heads": (2, 2)}),
        "up": Rule(f"{mlp}.c_fc", "colwise", "user", Cut()),
        "down": Rule(f"{mlp}.c_proj", "rowwise", "user", Cut()),
    }
    return [rule for rule in (right | changed).values() if rule is not None]


def wrong_sum(plan: Plan) -> Plan:
    """`plan`, in which nobody sums the gradient of the norm over the queries of one layer."""
    name = "model.layers.1.self_attn.q_norm.weight"
    return replace(plan, tensors=tuple(replace(row, partial=row.partial and row.name != name) for row in plan))


WRONG: dict[str, tuple[str, Callable[[nn.Module], Plan], str]] = {
    "right": ("gpt2", lambda model: resolve(model, rules(), 2), ""),
    "cut straight through": (
        "gpt2",
        lambda model: resolve(model, rules(fused=Rule("transformer.h.*.attn.c_attn", "colwise", "user", Cut())), 2),
        r"attn.c_proj.weight is given on rank \d is off by",
    ),
    "numbers left whole": ("gpt2", lambda model: resolve(model, rules(numbers=None), 2), "not enough values to unpack"),
    "output left whole": ("gpt2", lambda model: resolve(model, rules(down=None), 2), r"is given|RuntimeError"),
    "input left whole": ("gpt2", lambda model: resolve(model, rules(up=None), 2), r"is given|RuntimeError"),
    "sum left out": ("qwen3", lambda model: wrong_sum(shardwise.plan(model, 2)), "q_norm.weight is off by"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_plans_are_refused_without_the_weights(case, monkeypatch):
    """Guards: a proof without weights that every plan passes: of outputs that other ranks' parts of are missing, of inputs that
    are another head's, of gradients that are not summed.
    """
    name, make, said = WRONG[case]
    shrunk(monkeypatch)
    model = types.build(name)
    if not said:
        assert shardwise.prove(make(model), model)
        return
    with pytest.raises(PlanError, match=said):
        shardwise.prove(make(model), model)


class Wide(nn.Module):
    """Attention with 6 heads of 256 and two KV heads, and an MLP whose gate and up are fused, as wide as it takes samples."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 1536 + 2 * 512), nn.Linear(1536, 8)
        self.up, self.down = nn.Linear(8, 2 * 1100), nn.Linear(1100, 8)
        self.scale = nn.Parameter(torch.rand(1100, 2))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, 8) -> the same."""
        q, k, v = (part.unflatten(-1, (-1, 256)).transpose(1, 2) for part in self.qkv(x).split([1536, 512, 512], -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.up(x).chunk(2, -1)
        return x + self.down(gate.sigmoid() * up * self.scale.sum(1))


def test_samples_find_what_all_inputs_show(monkeypatch):
    """Guards: blocks that are taken for longer or shorter than they are, channels of an MLP that are another one's, a
    parameter whose slices are others': beside asking each input alone.
    """
    model = Wide()
    trace = Trace(parameters := dict(model.named_parameters()))
    with torch.enable_grad():
        floats(model, {"x": torch.randn(2, 3, 8)}, trace)

    def islands(probe: Probe) -> list[object]:
        reads = [found for product in probe.consumers if (found := probe.reads(product)) is not None]
        return sorted(islands_of(reads, probe.in_blocks), key=lambda island: island.count)

    sampled = islands(Probe(trace.calls, parameters))
    monkeypatch.setattr("shardwise.infer.probe.DENSE", 10_000)
    assert [island.count for island in sampled] == [2, 8, 1100]  # 8: the residual stream, without a norm
    assert sampled == islands(Probe(trace.calls, parameters))
    assert sampled[2].sliced["scale"] == (0, tuple(range(1100)))


class Crossed(nn.Module):
    """An MLP of which each channel reads two of the first layer's outputs, its own and the next one's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 1100), nn.Linear(1100, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> the same."""
        up = self.up(x)
        return self.down(up * up.roll(1, -1))


def test_channels_that_are_not_apart_are_seen():
    """Guards: channels dealt that read each other's: no sample of some channels shows it, the numbers of all do."""
    plan = shardwise.infer_plan(Crossed(), 2, {"x": torch.randn(64, 8)})
    assert {row.rule.style for row in plan if row.sharded} == {"colwise_gather_output"}  # each product by itself


def test_weight_that_is_no_product_gets_values():
    """Guards: a model that stops where a large weight without values is used in another way, or is used so silently."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 40_000, bias=False), nn.Linear(40_000, 64, bias=False)
            self.table = nn.Parameter(torch.rand(40_000, 200))

        def forward(self, x: Tensor) -> Tensor:
            """(batch, 64) -> the same."""
            return self.down(self.up(x.to(self.up.weight.device)) * self.table.mean(1))

    model = Scaled()
    tried = subject(model, {"x": torch.randn(8, 64)}).model
    assert [name for name, p in tried.named_parameters() if p.is_meta] == ["up.weight", "down.weight"]
    tried.table = nn.Parameter(tried.table.data.to("meta"), requires_grad=False)
    with pytest.raises(ValuesNeeded, match="table is used by mean"), Given(dict(tried.named_parameters())):
        tried(torch.randn(8, 64))
    plan = shardwise.infer_plan(model, 2, {"x": torch.randn(8, 64)})
    assert {row.name for row in plan if row.sharded} == {"up.weight", "down.weight", "table"}


def layers_of(config: PreTrainedConfig) -> int:
    """How many layers have one of each kind."""
    with torch.device("meta"):
        return kinds.needed_layers(hf.build(config), {})


def test_one_layer_of_each_kind():
    """Guards: a kind of layer that is left out, and never tried; all of them tried."""
    assert layers_of(AutoConfig.for_model("llama")) == 1
    assert layers_of(AutoConfig.for_model("qwen3_next")) == 4  # each fourth has full attention
    assert layers_of(AutoConfig.for_model("deepseek_v3", num_hidden_layers=6)) == 4  # the first three have no experts
    config = AutoConfig.for_model("gemma3_text")
    shorter = hf.cut(config, 2)
    assert (shorter.num_hidden_layers, shorter.layer_types) == (2, config.layer_types[:2])
    assert config.num_hidden_layers == 26


def test_layer_that_is_cut_otherwise_is_tried():
    """Guards: a plan of which one layer in 32 is wrong, and the proof of another one's."""
    plan = shardwise.plan(AutoConfig.for_model("llama"), 2)
    proof = plan.prove()
    assert "1 of 32 layers" in proof.tried
    assert [island.count for island in proof.islands] == [1, 32, 32, 1]
    name = "model.layers.5.self_attn"
    tensors = tuple(replace(row, layout=Sharded(0)) if row.name == f"{name}.k_proj.weight" else row for row in plan)
    assert "6 of 32 layers" in replace(plan, tensors=tensors).prove().tried  # as it was, in other words
    wrong = tuple(row for row in plan.modules if row.name != f"{name}.o_proj")
    with pytest.raises(PlanError, match=r"off by|RuntimeError"):
        replace(plan, modules=wrong).prove()


def test_plan_proves_itself(tmp_path):
    """Guards: a plan that must be told which model it is for; one that is compared or pickled with its model; one that asks
    a model that is gone.
    """
    config = types.build("llama").config
    plan = shardwise.plan(config, 2)
    assert plan.prove().outputs < 1e-5
    with pytest.raises(PlanError, match=r"off by|Error"):
        replace(plan, modules=plan.modules[:-1]).prove()
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    assert "origin=" not in repr(plan)
    with pytest.raises(PlanError, match="does not know which model"):
        copy.prove()
    assert copy.prove(types.build("llama"))
    model = Wide()
    inferred = shardwise.infer_plan(model, example_inputs={"x": torch.randn(2, 3, 8)})  # two ranks, where torchrun says nothing
    assert inferred.size == 2
    assert inferred.prove()
    del model
    gc.collect()
    with pytest.raises(PlanError, match="or that is gone"):
        inferred.prove()


def test_ranks_are_those_that_torchrun_started(monkeypatch):
    """Guards: a plan for two ranks under torchrun with four."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert shardwise.infer_plan(types.build("llama", num_key_value_heads=4)).size == 4


def test_last_layer_that_is_like_no_other_is_picked():
    """Guards: 32 layers tried out because the last one has a bias that the others lack; its rule for all of them, or none."""
    found = infer(hf.build_on_meta(AutoConfig.for_model("gpt_neox_japanese")), 2)
    assert "2 of 32 layers" in found.proof.tried
    biases = [row for row in found.plan if row.name.endswith("attention.dense_bias")]
    assert [row.name for row in biases] == ["gpt_neox_japanese.layers.31.attention.dense_bias"]
    assert {row.sharded for row in found.plan if row.name.endswith(("dense.weight", "query_key_value.weight"))} == {True}
