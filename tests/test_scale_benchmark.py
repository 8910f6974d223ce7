"""`benchmarks.scale`: that it runs, and counts what can be said without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOKENS = 64


def measured(model: str, tp: int, ep: int = 0) -> dict[str, object]:
    """What the worker says of a case."""
    command = [sys.executable, "-m", "benchmarks.scale.worker", model, str(tp), str(ep), str(TOKENS)]
    done = subprocess.run(command, cwd=ROOT, check=True, timeout=240, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_llama_of_70b():
    """Guards: sizes other than the published ones; bytes of a step that are counted twice, or not at all; a ring of two that
    sends other than its payload in an all-reduce, and half of it in a gather.
    """
    found = measured("Llama-3.3-70B", 2)
    assert found["parameters"] == 70_553_706_496
    assert found["most_bytes"] / found["full_bytes"] < 0.501
    reduced, gathered = (4 * 80 + 2) * TOKENS * 8192 * 2, TOKENS * 128256 * 2
    assert found["traffic"] == {
        "all-gather": {"calls": 1, "payload": gathered, "sent": gathered // 2},
        "all-reduce": {"calls": 4 * 80 + 2, "payload": reduced, "sent": reduced},
    }


def test_deepseek_v3_with_its_experts_over_64_ranks():
    """Guards: experts of which no row travels, or more than all. A rank deals 8 of 64 tokens, each to 8 experts, so one row to
    each rank; rows go forth and back, and so do their gradients, beside a table of how many they are.
    """
    found = measured("DeepSeek-V3", 8, 64)
    assert found["parameters"] == 671_026_404_352
    layers, rows, table = 58, 64 * 7168 * 2, 256 * 8
    assert found["traffic"]["all-to-all"] == {
        "calls": 5 * layers,
        "payload": layers * (4 * rows + table),
        "sent": layers * (4 * rows + table) * 63 // 64,
    }
