"""`shardwise.verify`: sound models pass, and of each fault that is put in, culprit and explanation are the right ones."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import shardwise
from broken_styles import STYLES
from shardwise.errors import MeshError, PlanError, ShardwiseError
from shardwise.testing import RankPool
from shardwise.verify import Verification
from shardwise.verify.attempt import Raised, attempt
from shardwise.verify.compare import (
    Exact,
    Rounded,
    differing_replicas,
    gradient_errors,
    saved_differences,
    token_differences,
)
from shardwise.verify.measure import Found, Generated
from shardwise.verify.proven import island_of
from shardwise.verify.result import Check, Culprit, Hypothesis
from verified import search_here, verify_here

ATTENTION, MLP = "layers.*.self_attn", "layers.*.mlp"
FIRST = "model.layers.0"
LAST = "model.layers.1"

# A type, the rules that break it, and what has to be said: the module, what of it, in which phase, and the explanation.
FAULTS = {
    "rowwise-made-colwise": (
        "llama",
        {f"{ATTENTION}.o_proj": "colwise"},
        f"{FIRST}.self_attn.o_proj",
        "its input",
        "a part where all of it is expected",
    ),
    "colwise-made-rowwise": (
        "llama",
        {f"{MLP}.gate_proj": "rowwise", f"{MLP}.up_proj": "rowwise"},
        f"{FIRST}.mlp.gate_proj",
        "its input",
        "whole where a part is expected",
    ),
    "forgotten-norm": (
        "qwen3",
        {f"{ATTENTION}.q_norm": "replicate"},
        f"{LAST}.self_attn.q_norm",
        "the gradient of its weight",
        "a missing gradient sum over the ranks",
    ),
    "bias-on-every-rank": (
        "starcoder2",
        {f"{ATTENTION}.o_proj": "bias_on_every_rank"},
        f"{FIRST}.self_attn.o_proj",
        "its output",
        "a bias added by every rank",
    ),
    "transposed-bias-on-every-rank": (
        "gpt2",
        {"h.*.mlp.c_proj": "bias_on_every_rank"},
        "transformer.h.0.mlp.c_proj",
        "its output",
        "a bias added by every rank",
    ),
    "sum-missing": (
        "llama",
        {f"{MLP}.down_proj": "not_summed"},
        f"{FIRST}.mlp.down_proj",
        "its output",
        "a missing sum over the ranks",
    ),
    "summed-twice": (
        "llama",
        {f"{MLP}.down_proj": "summed_twice"},
        f"{FIRST}.mlp.down_proj",
        "its output",
        "a sum made once too often (x 2)",
    ),
    "mean": ("llama", {f"{MLP}.down_proj": "averaged"}, f"{FIRST}.mlp.down_proj", "its output", "a mean instead of a sum"),
    "gathered-backwards": ("llama", {"lm_head": "gathered_backwards"}, "lm_head", "its output", "a permuted shard"),
    "input-not-summed": (
        "llama",
        {f"{ATTENTION}.k_proj": "input_not_summed"},
        f"{LAST}.self_attn.k_proj",
        "the gradient of its input",
        "a missing gradient sum over the ranks",
    ),
    "fused-cut-straight": (
        "phi3",
        {f"{MLP}.gate_up_proj": "colwise"},
        f"{FIRST}.mlp.gate_up_proj",
        "what becomes of its output: the input of down_proj",
        "a permuted shard: fused blocks cut straight through",
    ),
    "fused-qkv-cut-straight": (
        "phi3",
        {f"{ATTENTION}.qkv_proj": "colwise"},
        f"{FIRST}.self_attn.qkv_proj",
        "what becomes of its output: the input of o_proj",
        "a permuted shard: fused blocks cut straight through",
    ),
    "accumulated-sum": (
        "qwen3",
        {f"{ATTENTION}.q_norm": "accumulated_sum"},
        "self_attn.q_norm",
        "the gradient of its weight, accumulated over 2 micro-batches",
        "a sum over the accumulated gradient",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(fault: str, pool2: RankPool) -> None:
    """Guards: a fault that passes, a culprit that is only a consequence, an explanation that does not fit the numbers or that
    fits by chance beside the right one.
    """
    model, rules, module, what, explanation = FAULTS[fault]
    result = pool2.run(verify_here, model, tp_plan=rules)[0]
    assert not result.passed
    culprit = result.culprit
    assert culprit is not None
    assert culprit.module.endswith(module)
    assert culprit.what == what
    assert culprit.phase == ("backward" if "gradient" in what else "forward")
    assert culprit.explanation is not None
    assert culprit.explanation.name == explanation
    others = [one for one in culprit.hypotheses if one.fits and one.name != explanation]
    assert all(one.name.startswith("the rule ") for one in others), others
    assert next(iter(rules.values())) in culprit.style
    assert explanation in str(result)
    assert result.proof is not None
    wrong = [island for island in result.proof.islands if island.problem is not None]
    assert wrong == [island_of(result.proof, culprit.module)]
    assert result.blame.startswith(f"It is the plan, which is wrong in one process already, in {wrong[0].name}. Leave out")


def test_checks_that_see_a_forgotten_norm(pool2: RankPool) -> None:
    """Guards: checks that fail for another reason than the fault: forward is right here, and the checkpoint."""
    result = pool2.run(verify_here, "qwen3", tp_plan={f"{ATTENTION}.q_norm": "replicate"})[1]  # any rank's
    failed = {check.name for check in result.failed}
    assert failed == {*(f"gradients, {n} micro-batch{'es' if n > 1 else ''}" for n in (1, 2, 3)), "replicas that differ"}
    assert all(0.5 < check.measured < 2 for check in result.failed if check.name.startswith("gradients"))
    names = [check.place for check in result.failed]
    assert all("q_norm.weight" in name for name in names)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {"sequence_parallel": True}),
        ("qwen3_moe", {"ep_size": 2}),
        ("deepseek_v3", {"dtype": "bfloat16"}),
        ("gpt2", {"dtype": torch.float64}),
        (
            "distilbert",
            {
                "tp_plan": {
                    "embeddings": "replicate",
                    "transformer.layer.*.attention": "replicate",
                    "transformer.layer.*.ffn.lin1": "colwise",
                    "transformer.layer.*.ffn.lin2": "rowwise",
                }
            },
        ),
    ],
    ids=["sequence-parallel", "expert-parallel", "bfloat16", "float64", "encoder"],
)
def test_sound_models_pass(model: str, options: dict[str, object], pool2: RankPool) -> None:
    """Guards: false alarms where activations are slices, experts are dealt, rounding is coarse, or nothing is a causal LM."""
    results = pool2.run(verify_here, model, **options)
    assert results[0].passed, str(results[0])
    assert results[0].culprit is None
    assert [str(result) for result in results] == [str(results[0])] * 2
    assert results[0].blame == ""
    assert results[0].proof


@pytest.mark.parametrize("model", ["gpt2", "mixtral", "deepseek_v3", "jamba", "falcon"])
def test_nothing_is_found_where_nothing_is_wrong(model: str, pool2: RankPool, tmp_path: Path) -> None:
    """Guards: activations that are a rank's own taken for wrong ones: the search looks at every module, both ways."""
    assert pool2.run(search_here, model, tmp_path) == [None, None]


def test_nothing_is_found_in_a_sequence_parallel_model(pool2: RankPool, tmp_path: Path) -> None:
    """Guards: slices of the sequence taken for wrong activations."""
    assert pool2.run(search_here, "llama", tmp_path, sequence_parallel=True) == [None, None]


def test_coarse_rounding_does_not_hide_a_fault(pool2: RankPool) -> None:
    """Guards: bounds in bfloat16 so wide that a gradient that nobody sums passes."""
    rules = {f"{ATTENTION}.q_norm": "replicate"}
    result = pool2.run(verify_here, "qwen3", tp_plan=rules, dtype="bfloat16")[0]
    assert not any(check.passed for check in result.checks if check.name.startswith("gradients"))
    assert result.culprit is not None
    assert result.culprit.module == f"{LAST}.self_attn.q_norm"


def raise_on_one(names: tuple[int, ...]) -> object:
    """On a rank: raise on the ranks `names`."""
    import torch.distributed as dist

    def run() -> str:
        if dist.get_rank() in names:
            raise ValueError("lost\nand more")
        return "done"

    try:
        return attempt("a test", run, seconds=1.0)
    except ValueError:
        return "raised"


@pytest.mark.parametrize(
    ("names", "expected"),
    [((), ["done", "done"]), ((1,), ["done", "raised"]), ((0, 1), [Raised("a test", "ValueError: lost")] * 2)],
    ids=["none", "one", "all"],
)
def test_what_one_rank_alone_raises_is_raised(names: tuple[int, ...], expected: list[object], pool2: RankPool) -> None:
    """Guards: a rank that goes on to the search alone, and hangs there; a shape error of all ranks that nobody looks into."""
    assert pool2.run(raise_on_one, names) == expected


def test_as_a_user_runs_it(tmp_path: Path) -> None:
    """Guards: a wrong exit code, ranks that do not find the styles of a file, a report without the culprit."""
    plan, page, numbers = tmp_path / "plan.json", tmp_path / "page.html", tmp_path / "numbers.json"
    plan.write_text(json.dumps({f"{MLP}.down_proj": "not_summed"}))
    styles = Path(__file__).with_name("broken_styles.py")
    arguments = ["qwen3", "--random", "--tp", 2, "--plan", plan, "--import", styles, "--html", page, "--json", numbers]
    done = command(*arguments)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    first, _, rest = done.stdout.partition("measured  at most")
    assert "The plan is wrong in model.layers.*.mlp, in one process already: outputs on rank 0 are off by" in first
    assert "✗  model.layers.*.mlp" in first
    assert "It is the plan" in rest
    assert "model.layers.0.mlp.down_proj  its output" in rest
    assert "It is a missing sum over the ranks." in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    assert "model.layers.0.mlp.down_proj" in page.read_text()
    assert "The proof of the plan" in page.read_text()
    told = json.loads(numbers.read_text())
    assert told["passed"] is False
    assert told["culprit"]["module"] == "model.layers.0.mlp.down_proj"
    assert [check["name"] for check in told["checks"] if not check["passed"]]
    assert [island["name"] for island in told["proof"]["islands"] if island["problem"]] == ["model.layers.*.mlp"]


def test_from_a_plain_process_with_a_model_in_memory() -> None:
    """Guards: a call of the library that needs torchrun, forgets the caller's own inputs, or verifies another model."""
    config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    ids = torch.arange(3, 13).view(2, 5)
    result = shardwise.verify(model, 2, inputs=[{"input_ids": ids, "labels": ids}], new_tokens=3)
    assert result
    assert len([check for check in result.checks if check.name.startswith("gradients")]) == 1
    assert "Verification" in type(result).__name__
    assert Verification.from_json(result.to_json()) == result


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "nowhere-at-all"}, ShardwiseError, "nowhere-at-all: no directory"),
        ({"model": "llama"}, ShardwiseError, "--random"),
        ({"model": "llama", "random": True, "tp_size": 3}, PlanError, "cannot be split over tp=3"),
        ({"model": "llama", "random": True, "tp_plan": {"nothing": "colwise"}}, PlanError, "nothing"),
        ({"model": "llama", "random": True, "tp_size": 1}, MeshError, "one rank"),
        ({"model": "llama", "random": True, "dtype": "float99"}, ShardwiseError, "float99"),
        ({"model": "llama", "random": True, "imports": ["no_such_module"]}, ShardwiseError, "no_such_module"),
    ],
    ids=["model", "random", "size", "rule", "one", "dtype", "import"],
)
def test_errors_come_before_any_process(arguments: dict, error: type[Exception], message: str, monkeypatch) -> None:
    """Guards: mistakes of the caller reported by workers, as tracebacks, after seconds."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(importlib.import_module("shardwise.verify.run"), "run_as_ranks", None)  # an attribute is the function
    with pytest.raises(error, match=message):
        shardwise.verify(**arguments)


def test_bounds_bite() -> None:
    """Guards: NaN taken for small, a gradient that is on one side only taken for right, other shapes broadcast."""
    one = Found(torch.ones(2, 3), 1.0, {"a": torch.ones(2), "b": torch.ones(2)})
    compare = Exact()
    assert compare.outputs(one, one, None).ratio == 0
    for wrong in (torch.full((2, 3), float("nan")), torch.ones(3), torch.ones(2, 3) + 1e-3):
        assert compare.outputs(Found(wrong, 1.0, None), one, None).ratio > 1
    assert compare.loss(Found(one.outputs, 1.001, None), one, None).ratio > 1
    assert compare.gradients({"a": torch.ones(2)}, one.gradients, None).ratio > 1
    assert compare.gradients({**one.gradients, "c": torch.ones(1)}, one.gradients, None).ratio > 1
    assert gradient_errors({"a": torch.full((2,), float("nan"))}, {"a": torch.ones(2)})["a"] != 0
    assert not Check("x", float("nan"), 1.0, "", "").passed
    assert not Check("x", None, 0, "", "not reached", reached=False).passed
    assert Check("x", None, 0, "", "does not generate").passed


def test_bound_of_rounded_numbers() -> None:
    """Guards: one process's rounding counted against the ranks; half a gradient that passes for rounding."""
    exact = Found(torch.ones(2, 3), 1.0, {"a": torch.ones(8), "b": torch.ones(8)})
    one = Found(torch.ones(2, 3) * 1.01, 1.01, {"a": torch.ones(8) * 1.01, "b": torch.ones(8) * 1.01})
    other = Found(torch.ones(2, 3) * 0.99, 0.99, {"a": torch.ones(8) * 0.99, "b": torch.ones(8) * 1.02})
    wrong = Found(torch.ones(2, 3) * 1.1, 1.1, {"a": torch.ones(8) * 0.99, "b": torch.ones(8) * 0.5})
    compare = Rounded(2.0**-8)
    for given, fits in ((other, True), (wrong, False)):
        measures = [
            compare.outputs(given, one, exact),
            compare.loss(given, one, exact),
            compare.gradients(given.gradients, one.gradients, exact.gradients),
        ]
        assert [measure.ratio <= 1 for measure in measures] == [fits] * 3


def test_equally_likely_tokens() -> None:
    """Guards: a tie taken for a fault, and a fault for a tie."""
    logits = torch.tensor([[[1.0, 1.0 - 1e-6, 0.0], [0.0, 5.0, 1.0]]])
    one = Generated(torch.tensor([[0, 1]]), logits)
    assert token_differences(one, one, 1e-4) == (0, 0)
    assert token_differences(Generated(torch.tensor([[1, 2]]), None), one, 1e-4) == (0, 1)
    assert token_differences(Generated(torch.tensor([[0, 2]]), None), one, 1e-4) == (1, 0)
    assert token_differences(Generated(torch.tensor([[0]]), None), one, 1e-4) == (1, 0)


def test_saved_tensors_are_compared_bit_by_bit(tmp_path: Path) -> None:
    """Guards: a permuted, a renamed, a cast or a lost tensor in a checkpoint that has the same keys or sizes otherwise."""
    right = {"a": torch.arange(4.0), "b": torch.arange(4.0), "c": torch.zeros(2), "d": torch.ones(1)}
    wrong = {"a": torch.arange(4.0), "b": torch.arange(4.0).flip(0), "c": -torch.zeros(2), "e": torch.ones(1)}
    for name, tensors in (("right", right), ("wrong", wrong)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert saved_differences(tmp_path / "wrong", tmp_path / "right") == ["b", "c", "d", "e"]
    assert saved_differences(tmp_path / "right", tmp_path / "right") == []


def test_replicas_that_differ() -> None:
    """Guards: a difference between two ranks neither of which is the first."""
    assert differing_replicas([{"a": "1"}, {"a": "1", "b": "2"}, {"b": "3", "a": "1"}]) == ["b"]


def test_report_of_a_culprit() -> None:
    """Guards: a page or a text that shows a failed check without the module, the numbers and the hypotheses."""
    fitting = Hypothesis("a missing sum", "the values add up", 1e-7, True)
    culprit = Culprit("m.q", "its output", "forward", "m.q: rowwise", 0.5, 1e-4, (2, 3), (("rank 0", "1.5"),), (fitting,))
    result = Verification("x", (("model", "x"),), (Check("logits", 0.5, 1e-4, "", "noise", "[0]"),), culprit)
    for text in (str(result), result.to_html()):
        for expected in ("m.q", "its output", "a missing sum", "1.0e-07", "1.5", "logits", "0.50"):
            assert expected in text
    assert "1 of 1 checks fail" in str(result)
    assert not result
    assert Verification.from_json(result.to_json()) == result


def test_broken_styles_are_all_tried() -> None:
    """Guards: a fault that nobody puts in any more."""
    used = {style for _, rules, *_ in FAULTS.values() for style in rules.values()}
    assert used >= set(STYLES)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`shardwise verify` as a user starts it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    words = [sys.executable, "-m", "shardwise.cli", "verify", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=280, env=environment, check=False)
