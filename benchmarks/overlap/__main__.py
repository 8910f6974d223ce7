"""`python -m benchmarks.overlap`: training steps of a rank whose every collective takes a known time, with `overlap=True` and
without.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers

from benchmarks.overlap.measure import Setting, measure
from benchmarks.overlap.summary import Row, rows, table

RESULTS = Path(__file__).parents[1] / "results" / "overlap" / "cpu.json"


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--delays", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0, 5.0], help="milliseconds a collective")
    parser.add_argument("--rounds", type=int, default=15, help="of all delays, each with overlap and without, in turns")
    parser.add_argument("--tiny", action="store_true", help="a small model: tries the program")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    given = parser.parse_args()
    setting = Setting(delays=tuple(given.delays), rounds=given.rounds)
    if given.tiny:
        setting = replace(setting, layers=2, width=64, inner=128, tokens=16)
    found = measure(setting)
    lines = rows(setting, found)
    print(table(setting, lines, found.weight_gradients))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(_record(setting, lines, found.weight_gradients), indent=1) + "\n")


def _record(setting: Setting, lines: list[Row], weight_gradients: float) -> dict[str, object]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "setting": asdict(setting),
        "weight_gradients_ms": weight_gradients,
        "rows": [asdict(line) for line in lines],
    }


if __name__ == "__main__":
    main()
