"""Checkpoints: loading and saving them, on 2 and on 4 ranks."""

from __future__ import annotations

from benchmarks.models import llama
from benchmarks.workload import FOUR, TWO, Case, Target, Workload

MEDIUM = llama("medium", layers=12, width=1024, inner=2752, heads=16, vocabulary=4096)
HUGE = llama("huge", layers=48, width=2048, inner=8192, heads=16, vocabulary=32000, dtype="bfloat16")
PARALLEL = ("shardwise", "transformers-5.14", "transformers-5.23", "torch-styles")


def cases(task: str, *bound: str) -> tuple[Case, ...]:
    """Both sizes on both numbers of ranks; the large one without those of whom every rank would build all of it."""
    lean = (*bound, *PARALLEL[:-1])
    return (
        Case("600 MiB, 2 ranks", task, MEDIUM, TWO),
        Case("600 MiB, 4 ranks", task, MEDIUM, FOUR, efforts=("full",)),
        Case("6 GiB, 2 ranks", task, HUGE, TWO, contenders=lean, large=True),
        Case("6 GiB, 4 ranks", task, HUGE, FOUR, contenders=lean, large=True, efforts=("full",)),
    )


LOADING = Workload(
    name="loading",
    title="Loading a checkpoint",
    figures={
        "ready": "s until the weights are read once",
        "from_pretrained": "of which from_pretrained",
        "over": "peak memory over the shards, MiB",
        "shards": "shards, MiB",
        "read share": "pages touched / shards",
        "asked share": "bytes asked / shards",
    },
    contenders=("plain-read", *PARALLEL),
    cases=cases("loading", "plain-read"),
    rounds=7,
    steps=1,
    quick=(2, 1),
    targets=(Target("over", 64), Target("ready", 1.0, "best peer"), Target("asked share", 1.05)),
)
SAVING = Workload(
    name="saving",
    title="Saving a checkpoint",
    figures={"on disk": "s until it is on the disk", "save_pretrained": "of which save_pretrained", "over": "peak memory, MiB"},
    contenders=("plain-write", *PARALLEL),
    cases=cases("saving", "plain-write"),
    rounds=7,
    steps=1,
    quick=(2, 1),
    targets=(
        # The largest tensor, an embedding or a projection of the MLP, and 64 MiB.
        Target("over", 16 + 64, cases=("600 MiB, 2 ranks", "600 MiB, 4 ranks")),
        Target("over", 125 + 64, cases=("6 GiB, 2 ranks", "6 GiB, 4 ranks")),
        Target("on disk", 1.5, "plain-write"),
    ),
)
WORKLOADS = (LOADING, SAVING)
