"""`python -m benchmarks.scale.worker MODEL TP EP [TOKENS]`: measure one case in this process, and print it as JSON."""

from __future__ import annotations

import copy
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

import shardwise
from benchmarks.scale.models import CONFIGS, Case
from shardwise import Estimate
from shardwise.debug.record import Collective
from shardwise.estimate.kinds import payload_bytes, ring_bytes
from shardwise.mesh import tp_mesh
from shardwise.testing.fake import fake_rank

_Result = TypeVar("_Result")


def main() -> None:
    """Measure the case of the command line."""
    model, tp, ep, *tokens = sys.argv[1:]
    case = Case(model, int(tp), int(ep) or None)
    print(json.dumps(measure(case, CONFIGS[model], *map(int, tokens))))


def measure(case: Case, config: PreTrainedConfig, tokens: int = 0) -> dict[str, object]:
    """The figures of `config` in `case`: seconds, MiB of this process, bytes of a rank; with `tokens`, what a step sends, too.

    The code is imported before, by a model of one layer.
    """
    _warm_up(config, case)
    start = resident()
    plan, plan_seconds = timed(lambda: shardwise.plan(config, case.tp, ep_size=case.ep))
    plan_mib = peak() - start
    _, print_seconds = timed(lambda: str(plan))
    with fake_rank(case.ranks):
        mesh = tp_mesh(case.tp, ep_size=case.ep)
        model, build_seconds = timed(lambda: build(config))
        _, parallelize_seconds = timed(lambda: shardwise.parallelize(model, mesh, ep_size=case.ep))
        held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        assert held == plan.local_bytes(0), "the plan says otherwise"
        construct_mib = peak() - start
    step, step_seconds = timed(lambda: simulated(config, case, tokens)) if tokens else (None, None)
    ranks = [plan.local_bytes(rank) for rank in range(case.ranks)]
    return {
        "layers": config.num_hidden_layers,
        "tokens": tokens,
        "plan_s": plan_seconds,
        "print_s": print_seconds,
        "build_s": build_seconds,
        "parallelize_s": parallelize_seconds,
        "step_s": step_seconds,
        "plan_mib": plan_mib,
        "construct_mib": construct_mib,
        "step_mib": peak() - start,
        "full_bytes": plan.full_bytes,
        "parameters": sum(row.bytes // row.dtype.itemsize for row in plan if not row.buffer),
        "most_bytes": max(ranks),
        "least_bytes": min(ranks),
        "traffic": traffic(step.collectives) if step else {},
    }


def build(config: PreTrainedConfig) -> nn.Module:
    """The model on meta, in training mode."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).train()


def simulated(config: PreTrainedConfig, case: Case, tokens: int) -> Estimate:
    """A training step of one sequence."""
    return shardwise.estimate(config, case.tp, batch=1, sequence=tokens, ep_size=case.ep)


def traffic(collectives: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """How many collectives of each kind there are, the larger side of what is given to them, and what a ring would send."""
    kinds: dict[str, Counter[str]] = {}
    for one in collectives:
        kinds.setdefault(one.op.replace("_", "-"), Counter()).update(calls=1, payload=payload_bytes(one), sent=ring_bytes(one))
    return {kind: dict(found) for kind, found in sorted(kinds.items())}


def _warm_up(config: PreTrainedConfig, case: Case) -> None:
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    if case.ep:
        small.first_k_dense_replace = 0
    str(shardwise.plan(small, case.tp, ep_size=case.ep))


def timed(work: Callable[[], _Result]) -> tuple[_Result, dict[str, float]]:
    """What `work` gives, and its seconds: on the clock, and of this process's CPU, which others don't change."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}


def resident() -> float:
    """MiB that this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak() -> float:
    """MiB that this process has had in memory at most. The start's own peak counts too, so growth is never understated."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
