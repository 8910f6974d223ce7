"""What is compared: shardwise, its peers, and the bounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.environments import DTENSOR, HERE, HOOKS, Environment


@dataclass(frozen=True)
class Contender:
    """One way to run a model.

    Args:
        name: in results and on the command line.
        label: in tables and plots.
        adapter: the module of `benchmarks.adapters` that knows how.
        variables: of the environment that its processes get.
        alone: whether it is one process, whatever the number of ranks.
        threads: that each of its processes computes with.
    """

    name: str
    label: str
    adapter: str
    environment: Environment = HERE
    variables: dict[str, str] = field(default_factory=dict)
    alone: bool = False
    threads: int = 1
    peer: bool = False


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("floor", "floor: no communication", "floor"),
        Contender("by-hand", "floor, all-reduces written by hand", "by_hand"),
        Contender("shardwise", "shardwise", "ours"),
        Contender("after-tracing", "shardwise, after a trace and a breakpoint", "traced"),
        Contender("shardwise-gloo", "shardwise over gloo", "ours", variables={"SHARDWISE_CPU_BACKEND": "gloo"}),
        Contender("transformers-5.14", "transformers 5.14.1 (hooks)", "hf", HOOKS, peer=True),
        Contender("transformers-5.23", "transformers 5.23.0 (DTensor)", "hf", DTENSOR, peer=True),
        Contender("torch-styles", "torch parallelize_module", "styles", DTENSOR, peer=True),
        Contender("one-process", "one process", "whole", alone=True),
        Contender("one-process-2", "one process, 2 threads", "whole", alone=True, threads=2),
        Contender("plain-read", "the shards' bytes, copied plainly", "copied"),
        Contender("plain-write", "the same bytes, written plainly", "plain", alone=True),
    )
}
PEERS = tuple(name for name, contender in CONTENDERS.items() if contender.peer)
