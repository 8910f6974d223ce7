"""The proof of a plan part by part: which parts there are, which of a wrong plan are wrong, and what that says of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import broken_styles  # noqa: F401  registers what is wrong
import shardwise
from parity import types
from shardwise.errors import PlanError
from shardwise.infer import Island, Proof, examine
from shardwise.infer.compare import Run, compare
from shardwise.infer.parts import only, parts_of
from shardwise.resolve import resolve
from shardwise.spec import Rule
from shardwise.verify import Verification
from shardwise.verify.judge import before_ranks, with_proof
from shardwise.verify.result import Check, Culprit
from shardwise.verify.settings import Settings

PARTS = {
    "qwen3": ["model.embed_tokens", "model.layers.*.self_attn", "model.layers.*.mlp", "lm_head"],
    "gpt2": ["transformer.wte, lm_head", "transformer.h.*.attn", "transformer.h.*.mlp"],
    "opt": ["model.decoder.embed_tokens, lm_head", "model.decoder.layers.*.self_attn", "model.decoder.layers.*.fc1, fc2"],
    "bert": [
        "bert.embeddings.word_embeddings, cls.predictions.decoder, cls.predictions",
        "bert.embeddings.position_embeddings",
        "bert.encoder.layer.*.attention",
        "bert.encoder.layer.*.intermediate, output",
        "cls.predictions.transform.dense",
    ],
}


@pytest.mark.parametrize("name", list(PARTS))
def test_parts_are_what_is_cut_by_itself(name):
    """Guards: an MLP whose halves, or a tied embedding whose ends, are tried one without the other; a layer's parts taken for
    those of another one.
    """
    plan = shardwise.plan(types.on_meta(name), 2)
    parts = parts_of(plan)
    assert [part.name for part in parts] == PARTS[name]
    assert all(part.count == (2 if "*" in part.name else 1) for part in parts)
    cut = {row.name for row in plan if row.sharded}
    assert cut == {row.name for part in parts for row in only(plan, [part]) if row.sharded}


def test_part_that_is_right_in_all_layers_but_one():
    """Guards: a rule for one layer that is blamed on all of them."""
    plan = shardwise.plan(types.on_meta("llama"), 2, {"layers.1.mlp.down_proj": "not_summed"})
    assert [part.name for part in parts_of(plan) if "mlp" in part.name] == ["model.layers.0.mlp", "model.layers.1.mlp"]


ATTENTION, MLP = "layers.*.self_attn", "layers.*.mlp"


@pytest.mark.parametrize(
    ("rules", "wrong", "said"),
    [
        ({f"{MLP}.down_proj": "not_summed"}, ["mlp"], "first behind model.layers.0.mlp.down_proj"),
        ({f"{ATTENTION}.o_proj": "colwise"}, ["self_attn"], "in model.layers.0.self_attn.o_proj"),
        ({f"{ATTENTION}.k_proj": "input_not_summed"}, ["self_attn"], "the gradient of model.layers.1.input_layernorm.weight"),
        (
            {f"{ATTENTION}.q_norm": "replicate", f"{MLP}.down_proj": "summed_twice", "lm_head": "gathered_backwards"},
            ["self_attn", "mlp", "lm_head"],
            "first behind model.layers.0.mlp.down_proj",
        ),
    ],
    ids=["output", "shape", "gradient", "three at once"],
)
def test_wrong_parts_are_named_and_no_others(rules, wrong, said):
    """Guards: a part that is blamed for what comes to it; one that is passed as another one is wrong, too; a refusal without
    the rule to leave out.
    """
    model = types.build("qwen3")
    plan = shardwise.plan(model, 2, rules)
    proof = examine(plan, model)
    assert said in proof.problem
    assert [i.name.rpartition(".")[2] for i in proof.islands if i.problem is not None] == wrong
    assert all(i.gradients < 1e-5 for i in proof.islands if i.problem is None)
    with pytest.raises(PlanError) as caught:
        shardwise.prove(plan, model)
    for pattern, style in rules.items():
        assert f"{pattern}: {style}" in str(caught.value)


def test_islands_of_a_right_plan_have_figures():
    """Guards: a proof that names no parts, or gives each the figure of the whole."""
    model = types.build("llama")
    proof = examine(shardwise.plan(model, 2), model)
    assert proof
    assert [island.count for island in proof.islands] == [1, 2, 2, 1]
    assert all(island.problem is None and island.yours == () for island in proof.islands)
    assert max(island.gradients for island in proof.islands) <= proof.gradients
    assert all(island.worst.startswith(island.name.partition(".*")[0]) for island in proof.islands)
    assert len({island.gradients for island in proof.islands}) == 4


@pytest.mark.parametrize(
    ("gradients", "passes"),
    [
        ([[1.0, 2.0], [1.0, 2.0]], True),
        ([[1.0, 2.0], [float("nan"), 2.0]], False),
        ([[1.0, 2.0], [1.0, float("inf")]], False),
        ([[1.0, 2.0], [1.0, 2.01]], False),
    ],
)
def test_gradient_that_is_no_number_is_wrong(gradients, passes):
    """Guards: not a number, which is no larger than anything, taken for small; the last rank left out."""
    plan = resolve(nn.Linear(2, 1, bias=False), [], 2)
    expected = Run(gradients={"weight": torch.tensor([[1.0, 2.0]])})
    proof = compare(expected, plan, [Run(gradients={"weight": torch.tensor([found])}) for found in gradients])
    assert bool(proof) is passes
    assert passes or proof.place == "weight"


class Trained(nn.Module):
    """An MLP that does something else in training.

    Args:
        otherwise: what, with the hidden features.
    """

    def __init__(self, otherwise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.drop, self.norm, self.down = nn.Linear(8, 16), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(16, 8)
        self.otherwise = otherwise

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> the same."""
        h = self.drop(self.up(x).relu())
        return self.norm(x) + self.down(self.otherwise(h) if self.training else h)


def unlike_itself(h: Tensor) -> Tensor:
    """Another one at each call."""
    return h + torch.randn(h.shape)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(
    ("otherwise", "norm", "passes"),
    [
        (torch.tanh, False, True),
        (lambda h: h / h.norm(dim=-1, keepdim=True), False, False),
        (unlike_itself, False, True),
        (torch.tanh, True, True),
    ],
    ids=["parts alone", "all features", "random", "statistics of batches"],
)
def test_training_code_is_proven(otherwise, norm, passes, batches):
    """Guards: a plan that is right in evaluation alone; dropout, noise or running statistics, which are others on each rank or
    at each call, taken for errors.
    """
    model = Trained(otherwise)
    model.norm = model.norm if norm else nn.Identity()
    plan = resolve(model, [Rule("up", "colwise", "user"), Rule("down", "rowwise", "user")], 2)
    inputs = [{"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))} for seed in range(batches)]
    proof = examine(plan, model, inputs)
    assert bool(proof) is passes, proof.problem
    assert passes or "up, down" in [island.name for island in proof.islands if island.problem]


RIGHT, WRONG = (Check("logits", error, 1e-4, "", "noise") for error in (1e-7, 0.5))
ISLANDS = tuple(Island(name, 2, "colwise", (), 1e-7, "m.w") for name in ("m.layers.*.attn", "m.layers.*.fc1, fc2", "head"))
PROOF = Proof(2, 1e-7, 1e-7, "m.w", islands=ISLANDS)
BAD = replace(PROOF, problem="the gradient of m.w is off by 1", islands=(replace(ISLANDS[0], problem="x", yours=("a: b",)),))


@pytest.mark.parametrize(
    ("proof", "check", "blame", "passed"),
    [
        (PROOF, RIGHT, "", True),
        (PROOF, WRONG, "The plan is right: m.layers.*.fc1, fc2 is proven in one process. Look at what only ranks do:", False),
        (
            BAD,
            WRONG,
            "It is the plan, which is wrong in one process already, in m.layers.*.attn. Leave out your rule a: b.",
            False,
        ),
        (BAD, RIGHT, "It is the plan, which is wrong in one process already", False),
        ("no inputs", WRONG, "", False),
        ("no inputs", RIGHT, "", True),
    ],
    ids=["right", "ranks alone", "plan", "plan alone", "not proven", "not proven, right"],
)
def test_whose_fault_it_is(proof: Proof | str, check: Check, blame: str, passed: bool) -> None:
    """Guards: a plan that is blamed for what ranks do; ranks that are searched where the plan is wrong; exit code 0 for a plan
    that was found wrong, or a failure of one that could not be tried.
    """
    settings = Settings("llama", random=True, compiled=True)
    known = before_ranks(settings, shardwise.plan(settings.subject().config, 2), proof)
    culprit = None if check.passed else Culprit("m.layers.1.fc2", "its output", "forward", "", 0.5, 1e-4)
    result = with_proof(settings, Verification("x", (), (check,), culprit), known)
    assert result.blame.startswith(blame)
    assert bool(result.blame) is bool(blame)
    assert ("compiled code" in result.blame) is (proof is PROOF and not check.passed)
    assert result.passed is passed
    assert ("not proven in one process: no inputs" in str(result)) is isinstance(proof, str)
    assert result.blame.split(". ")[0] in " ".join(str(result).split())
    assert Verification.from_json(result.to_json()) == result
    for text in (str(result), result.to_html()):
        assert ("fc1, fc2" in text) is (proof is PROOF)
