"""`benchmarks.gpu` on the CPU, with tiny shapes: that it runs, and measures what it says. Its figures mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_backend_is_measured(tmp_path):
    """Guards: a benchmark that has rotted by the time that there is a GPU to run it on; a failure that looks like a figure."""
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "--tiny", "--device", "cpu", "--seconds", "0"]
    measured = ["--dtype", "bfloat16", "--tp", "2", "--rounds", "2", "--runs", "1"]
    subprocess.run([*command, *measured], cwd=ROOT, check=True, timeout=240)
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    assert [result["case"]["label"] for result in results] == ["one", "floor", "shardwise", "transformers"]
    for result in results:
        assert result["error"] == ""
        for cell, found in result["cells"].items():
            if cell.endswith("eager"):
                assert len(found["samples"]) == 2
                assert all(sample["device"] > 0 for sample in found["samples"])
            else:
                assert found["error"].startswith("left out")
    assert (tmp_path / "shardwise-tp2-bfloat16-train-eager.json.gz").exists()
