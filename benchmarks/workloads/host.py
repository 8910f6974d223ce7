"""What the host does for a small model on one rank of eight, whose collectives return at once: pure overhead."""

from __future__ import annotations

from benchmarks.models import llama
from benchmarks.workload import FAKE8, Case, Target, Workload

NARROW = llama("narrow", layers=24, width=64, inner=128, heads=8, vocabulary=128)
CONTENDERS = ("floor", "shardwise", "transformers-5.14", "transformers-5.23", "torch-styles")

TRAINING = Workload(
    name="host-training",
    title="Host cost of a training step, eager",
    figures={"ms": "ms"},
    contenders=CONTENDERS,
    cases=(Case("24 layers of 64", "training", NARROW, FAKE8, {"batch": 1, "length": 16}),),
    rounds=25,
    steps=7,
    quick=(5, 5),
    targets=(Target("ms", 1.08, "floor"), Target("ms", 1 / 6, "torch-styles")),
    published={"floor": "24.7", "transformers-5.14": "29.5", "transformers-5.23": "165", "torch-styles": "207"},
)
DECODE = Workload(
    name="host-decode",
    title="Host cost of decoding a token, eager",
    figures={"ms": "ms a token", "first token": "first token, ms"},
    contenders=CONTENDERS,
    cases=(Case("24 layers of 64", "decode", NARROW, FAKE8, {"prompt": 8, "tokens": 8}),),
    rounds=25,
    steps=3,
    quick=(5, 3),
    targets=(Target("ms", 1.12, "floor"),),
    published={"floor": "6.4", "transformers-5.14": "9.6", "transformers-5.23": "11.7", "torch-styles": "50.8"},
)
WORKLOADS = (TRAINING, DECODE)
