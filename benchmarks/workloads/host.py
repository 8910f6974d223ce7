"""What the host does for a small model on one rank of eight, whose collectives return at once: pure overhead."""

from __future__ import annotations

from benchmarks.models import llama
from benchmarks.workload import FAKE8, Case, Target, Workload

NARROW = llama("narrow", layers=24, width=64, inner=128, heads=8, vocabulary=128)
FOUR, TWO = (llama(f"narrow-{layers}", layers, width=64, inner=128, heads=8, vocabulary=128) for layers in (4, 2))
REFERENCES = {
    "training": {"floor": 24.7, "transformers-5.14": 29.5, "transformers-5.23": 165, "torch-styles": 207},
    "decode": {"floor": 6.4, "transformers-5.14": 9.6, "transformers-5.23": 11.7, "torch-styles": 50.8},
    "compiled": {"floor": 9.0, "transformers-5.14": 12.9, "transformers-5.23": 18.2},
}
CONTENDERS = ("floor", "shardwise", "transformers-5.14", "transformers-5.23", "torch-styles")
ONE_BATCH: dict[str, object] = {"batch": 1, "length": 16}
PER_LAYER: dict[str, object] = {"shorter": TWO.name, "layers": 2, "length": 16}

TRAINING = Workload(
    name="host-training",
    title="Host cost of a training step, eager",
    figures={"ms": "ms"},
    contenders=("floor", "by-hand", "shardwise", "after-tracing", *CONTENDERS[2:]),
    cases=(Case("24 layers of 64", "training", NARROW, FAKE8, ONE_BATCH, reference=REFERENCES["training"]),),
    rounds=25,
    steps=7,
    quick=(5, 5),
    targets=(Target("ms", 1.08, "floor"), Target("ms", 1 / 6, "torch-styles")),
)
DECODE = Workload(
    name="host-decode",
    title="Host cost of decoding a token, eager",
    figures={"ms": "ms a token", "first token": "first token, ms"},
    contenders=("floor", "shardwise", "after-tracing", *CONTENDERS[2:]),
    cases=(Case("24 layers of 64", "decode", NARROW, FAKE8, {"prompt": 8, "tokens": 8}, reference=REFERENCES["decode"]),),
    rounds=25,
    steps=3,
    quick=(5, 2),
    targets=(Target("ms", 1.12, "floor"),),
)
COMPILED = Workload(
    name="compiled-training",
    title="Training step under torch.compile",
    figures={
        "ms": "ms",
        "compile": "first step, cold, s",
        "graphs": "graphs",
        "breaks": "graph breaks",
        "recompiled": "more graphs over 20 steps",
    },
    contenders=("floor", "shardwise", "transformers-5.14", "transformers-5.23", "torch-styles", "one-process"),
    cases=(
        Case("24 layers of 64", "compiled", NARROW, FAKE8, ONE_BATCH, efforts=("full",), reference=REFERENCES["compiled"]),
        Case("2 layers of 64", "compiled", TWO, FAKE8, ONE_BATCH, efforts=("tiny", "quick")),
    ),
    rounds=25,
    steps=7,
    quick=(5, 5),
    targets=(
        Target("ms", 1.15, "floor"),
        Target("graphs", 1),
        Target("breaks", 0),
        Target("recompiled", 0),
        Target("compile", 1.0, "one-process"),
    ),
)
COLLECTIVES = Workload(
    name="collectives",
    title="Collectives in a decoder layer",
    figures={
        "collectives": "a layer",
        "forward": "forward",
        "backward": "backward",
        "all-reduce": "all-reduces",
        "all-gather": "all-gathers",
        "reduce-scatter": "reduce-scatters",
        "KiB": "KiB a layer",
        "outside": "outside of the layers",
    },
    contenders=("shardwise", "transformers-5.14", "transformers-5.23", "torch-styles"),
    cases=(
        Case("training step", "collectives", FOUR, FAKE8, PER_LAYER | {"train": True}, also=(TWO,)),
        Case("decoded token", "collectives", FOUR, FAKE8, PER_LAYER | {"train": False}, also=(TWO,)),
    ),
    rounds=1,
    steps=1,
    quick=(1, 1),
    targets=(
        Target("collectives", 4, cases=("training step",)),
        Target("collectives", 2, cases=("decoded token",)),
        Target("outside", 1, cases=("decoded token",)),
    ),
)
WORKLOADS = (TRAINING, DECODE, COLLECTIVES, COMPILED)
