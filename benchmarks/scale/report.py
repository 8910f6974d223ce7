"""The figures as a page."""

from __future__ import annotations

from statistics import median
from typing import Any

GIB = 2**30
NOTES = """\
One rank on torch's fake process group, in a fresh process for each figure; nothing is allocated at full or local size.

- *plan*: `shardwise.plan(config, tp_size)`, which builds the model on meta. *print*: `str(plan)`. *build*: the model on meta,
  by transformers. *parallelize*: that model, made parallel on meta, planning included. Seconds on the clock, median (least to
  most), and of the CPU, the median, which other work on the machine hardly changes.
- *host memory*: growth of the process's peak resident memory over what it was before planning; the imports came before.
"""
TRAFFIC = """\
A training step, forward and backward, of one sequence of {tokens} tokens in bfloat16, on fake tensors. *Payload*: bytes of the
tensors given to a collective, of gathers and exchanges the larger side; *sent*: what leaves a rank if a ring does it (twice the
payload times (n - 1) / n for an all-reduce, once for the others). Where experts are dealt to more ranks than tp's, each tp axis
has a sequence of its own, and tokens are dealt evenly here. What data parallelism would sum is not in it.
"""


def page(results: dict[str, Any]) -> str:
    """Two tables in markdown: what it takes here, and what a rank holds and sends."""
    cases = results["cases"]
    lines = [
        "# Scale on paper",
        "",
        f"torch {results['torch']}, transformers {results['transformers']}. " + NOTES,
        *_table(
            ["model", "layers", "tp", "ep", "plan", "print", "build", "parallelize", "host memory (MiB)"],
            [
                [*_name(case), *(_seconds(case, key) for key in _TIMES), f"{_middle(case, 'construct_mib'):.0f}"]
                for case in cases
            ],
        ),
        "",
        TRAFFIC.format(tokens=cases[0]["rounds"][0]["tokens"]),
        *_table(
            [
                "model",
                "layers",
                "tp",
                "ep",
                "GiB in all",
                "GiB a rank",
                "collectives",
                "payload (GiB)",
                "sent (GiB)",
                "by kind",
            ],
            [[*_name(case), *_held(case["rounds"][0]), *_sent(case["rounds"][0]["traffic"])] for case in cases],
        ),
    ]
    return "\n".join(lines) + "\n"


_TIMES = ("plan_s", "print_s", "build_s", "parallelize_s")


def _name(case: dict[str, Any]) -> list[str]:
    return [case["model"], str(case["rounds"][0]["layers"]), str(case["tp"]), str(case["ep"] or "")]


def _middle(case: dict[str, Any], key: str) -> float:
    return median(found[key] for found in case["rounds"])


def _seconds(case: dict[str, Any], key: str) -> str:
    clock, cpu = ([found[key][which] for found in case["rounds"]] for which in ("clock", "cpu"))
    return f"{median(clock):.2f} ({min(clock):.2f} to {max(clock):.2f}), CPU {median(cpu):.2f}"


def _held(found: dict[str, Any]) -> list[str]:
    least, most = (f"{found[key] / GIB:.2f}" for key in ("least_bytes", "most_bytes"))
    return [f"{found['full_bytes'] / GIB:.2f}", most if least == most else f"{least} to {most}"]


def _sent(traffic: dict[str, dict[str, int]]) -> list[str]:
    calls, payload, sent = (sum(kind[key] for kind in traffic.values()) for key in ("calls", "payload", "sent"))
    kinds = [f"{kind} {found['calls']} x, {found['payload'] / GIB:.2f} GiB" for kind, found in traffic.items()]
    return [str(calls), f"{payload / GIB:.2f}", f"{sent / GIB:.2f}", "; ".join(kinds)]


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [_line(heads), _line(["---"] * len(heads)), *map(_line, rows)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
