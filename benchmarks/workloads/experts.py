"""Mixtures of experts: few large ones, and many small ones; split (TP), or dealt whole to ranks (EP)."""

from __future__ import annotations

from benchmarks.models import Model
from benchmarks.workload import FAKE8, TWO, Case, Ranks, Target, Workload

COMMON = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "vocab_size": 512,
}
COARSE = Model("mixtral", "mixtral", COMMON | {"intermediate_size": 896, "num_local_experts": 8, "num_experts_per_tok": 2})
FINE_SIZES = {"moe_intermediate_size": 128, "intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 8}
FINE = Model("qwen3-moe", "qwen3_moe", COMMON | FINE_SIZES)
PARALLEL = ("shardwise", "transformers-5.14", "transformers-5.23")


def case(name: str, model: Model, ranks: Ranks, dealt: bool) -> Case:
    """A training step of one of the models."""
    where = "fake group of 8" if ranks.fake else f"{ranks.size} ranks"
    contenders = PARALLEL if dealt else ("floor", *PARALLEL)
    alone = () if ranks.fake else ("one-process",)
    options: dict[str, object] = {"batch": 2, "length": 128, "warm_up": 2, "expert_parallel": dealt}
    full_name = f"{name}, {'EP' if dealt else 'TP'}, {where}"
    return Case(full_name, "training", model, ranks, options, contenders=(*contenders, *alone))


CASES = tuple(
    case(name, model, ranks, dealt)
    for ranks in (FAKE8, TWO)
    for name, model in (("8 experts", COARSE), ("64 experts", FINE))
    for dealt in (False, True)
)
COMPARED = tuple(one.name for one in CASES if not (one.ranks.fake and one.options["expert_parallel"]))
"""All but tokens that travel on a fake group: what comes there is not what others would send."""

EXPERTS = Workload(
    name="experts",
    title="Mixture of experts, training step",
    figures={"ms": "ms"},
    contenders=PARALLEL,
    cases=CASES,
    rounds=15,
    steps=3,
    quick=(3, 1),
    targets=(Target("ms", 1.0, "best peer", cases=COMPARED),),
)
WORKLOADS = (EXPERTS,)
