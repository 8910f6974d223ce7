"""Two ranks on this machine's CPU, a thread each: communication and all. Each contender with the backend that it chooses."""

from __future__ import annotations

from benchmarks.models import llama
from benchmarks.workload import TWO, Case, Target, Workload

SMALL = llama("small", layers=8, width=512, inner=1376, heads=8, vocabulary=4096)
LARGE = llama("large", layers=12, width=1024, inner=2752, heads=16, vocabulary=4096)
PARALLEL = ("shardwise", "shardwise-gloo", "transformers-5.14", "transformers-5.23", "torch-styles")
CONTENDERS = ("floor", *PARALLEL, "one-process", "one-process-2")
SMALL_NAME, LARGE_NAME = "8 layers of 512", "12 layers of 1024"
SMALL_BATCH: dict[str, object] = {"batch": 2, "length": 256, "warm_up": 2}
LARGE_BATCH: dict[str, object] = {"batch": 1, "length": 128, "warm_up": 2}
TOKENS: dict[str, object] = {"prompt": 16, "tokens": 8}
REFERENCES = {
    "training": (
        {"floor": 428.0, "transformers-5.14": 650.0, "transformers-5.23": 715.0, "torch-styles": 735.0, "one-process": 734.0},
        {"floor": 630.0, "transformers-5.14": 1011.0, "transformers-5.23": 1075.0},
    ),
    "decode": (
        {"floor": 6.2, "transformers-5.14": 31.0, "transformers-5.23": 31.0, "torch-styles": 50.0, "one-process": 11.0},
        {"floor": 29.5, "transformers-5.14": 66.0, "transformers-5.23": 66.0, "torch-styles": 66.0, "one-process": 50.0},
    ),
}

TRAINING = Workload(
    name="training",
    title="Training step on two CPU ranks",
    figures={"ms": "ms"},
    contenders=CONTENDERS,
    cases=(
        Case(SMALL_NAME, "training", SMALL, TWO, SMALL_BATCH, reference=REFERENCES["training"][0]),
        Case(LARGE_NAME, "training", LARGE, TWO, LARGE_BATCH, efforts=("full",), reference=REFERENCES["training"][1]),
    ),
    rounds=11,
    steps=2,
    quick=(3, 1),
    targets=(Target("ms", 1.10, "floor"), Target("ms", 0.72, "best peer")),
)
DECODE = Workload(
    name="decode",
    title="Decoding a token on two CPU ranks",
    figures={"ms": "ms a token", "first token": "first token, ms"},
    contenders=CONTENDERS,
    cases=(
        Case(SMALL_NAME, "decode", SMALL, TWO, TOKENS, reference=REFERENCES["decode"][0]),
        Case(LARGE_NAME, "decode", LARGE, TWO, TOKENS, efforts=("full",), reference=REFERENCES["decode"][1]),
    ),
    rounds=11,
    steps=2,
    quick=(3, 1),
    targets=(
        Target("ms", 1.2, "floor"),
        Target("ms", 1 / 3, "best peer", cases=(SMALL_NAME,)),
        Target("ms", 1 / 2, "best peer", cases=(LARGE_NAME,)),
        Target("ms", 1 / 1.5, "one-process"),
    ),
)
OPTIMIZER = Workload(
    name="optimizer",
    title="Whole optimizer step on two CPU ranks",
    figures={
        "step, plain": "whole step, plain, ms",
        "clip": "clipping, ms",
        "plain": "AdamW, plain, ms",
        "foreach": "AdamW, foreach, ms",
        "fused": "AdamW, fused, ms",
    },
    contenders=("floor", "shardwise", "transformers-5.14", "transformers-5.23", "torch-styles", "one-process"),
    cases=(Case(SMALL_NAME, "optimizer", SMALL, TWO, {"batch": 2, "length": 256}),),
    rounds=11,
    steps=2,
    quick=(3, 1),
    targets=(Target("plain", 1.1, "floor"), Target("foreach", 1.1, "floor"), Target("fused", 1.1, "floor")),
)
LATENCY = Workload(
    name="collective-latency",
    title="A collective between two ranks, by size",
    figures={size: f"{size}, us" for size in ("2 KiB", "16 KiB", "128 KiB", "1 MiB", "4 MiB", "16 MiB")},
    contenders=("shardwise", "shardwise-gloo"),
    cases=tuple(
        Case(kind, "latency", SMALL, TWO, {"kind": kind})
        for kind in ("all-reduce", "all-gather", "reduce-scatter", "broadcast", "all-to-all")
    ),
    rounds=15,
    steps=3,
    quick=(3, 1),
)
WORKLOADS = (TRAINING, DECODE, OPTIMIZER, LATENCY)
