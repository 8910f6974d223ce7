"""`python -m benchmarks.scale`: measure every case, each in a fresh process, and write scale.json and scale.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from benchmarks.scale.models import CASES, Case
from benchmarks.scale.report import page

ROOT = Path(__file__).parents[2]
TOKENS = 4096  # of the step, which is simulated in the first round: what it sends is no matter of chance


def main() -> None:
    """Measure one case after the other; what was there stays where a case fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results" / "scale")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each case; of their times, the median")
    arguments = parser.parse_args()
    rounds: list[list[dict[str, object]]] = [[] for _ in CASES]
    for number in range(arguments.rounds):
        for case, found in zip(CASES, rounds, strict=True):
            found.append(run(case, TOKENS if number == 0 else 0))
            print(f"round {number + 1}: {case.model}, tp={case.tp}, ep={case.ep}: {found[-1]['plan_s']} s", flush=True)
    results = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cases": [{**asdict(case), "rounds": found} for case, found in zip(CASES, rounds, strict=True)],
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "scale.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.folder / "scale.md").write_text(page(results))
    print(page(results))


def run(case: Case, tokens: int) -> dict[str, object]:
    """The figures of a case, with a step of `tokens`, from a fresh process. Raises `CalledProcessError` where it fails."""
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.scale.worker", case.model, str(case.tp), str(case.ep or 0), str(tokens)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300, env=environment)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
