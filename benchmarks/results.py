"""The result files, one for each workload, and the statistics of what is in them."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles

from benchmarks.driver import Found

FOLDER = Path(__file__).parent / "results" / "cpu"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    middle: float
    low: float
    high: float


@dataclass
class Result:
    """A workload's results, by case and contender."""

    workload: str
    effort: str
    machine: dict[str, str | int] = field(default_factory=dict)
    cases: dict[str, dict[str, Found]] = field(default_factory=dict)

    def save(self, folder: Path = FOLDER) -> None:
        """Write its file; the others stay as they are."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.workload}.json").write_text(json.dumps(_rounded(asdict(self)), indent=1) + "\n")

    @classmethod
    def read(cls, workload: str, folder: Path = FOLDER) -> Result | None:
        """From its file; None where there is none."""
        path = folder / f"{workload}.json"
        if not path.exists():
            return None
        facts = json.loads(path.read_text())
        facts["cases"] = {
            case: {name: Found(**found) for name, found in contenders.items()} for case, contenders in facts["cases"].items()
        }
        return cls(**facts)

    def spread(self, case: str, contender: str, what: str) -> Spread | None:
        """A figure over the rounds, or a fact; None where it was not measured."""
        found = self.cases.get(case, {}).get(contender)
        return _spread(_values(found, what)) if found is not None else None

    def ratio(self, case: str, contender: str, other: str, what: str) -> Spread | None:
        """A figure as a multiple of the other contender's in the same round, over the rounds; None where one has none."""
        pair = [self.cases.get(case, {}).get(name) for name in (contender, other)]
        if any(found is None or not _values(found, what) for found in pair):
            return None
        rounds = [(mine, theirs) for mine, theirs in zip(*(_values(found, what) for found in pair), strict=False) if theirs]
        return _spread([mine / theirs for mine, theirs in rounds])


def machine() -> dict[str, str | int]:
    """What the figures depend on, without saying which machine it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cpu": names[0] if names else platform.machine(), "cores": cores, "system": platform.system()}


def _values(found: Found | None, what: str) -> list[float]:
    if found is None or found.error:
        return []
    return found.rounds.get(what) or ([found.facts[what]] if what in found.facts else [])


def _spread(values: list[float]) -> Spread | None:
    if not values:
        return None
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), low, high)


def _rounded(value: object) -> object:
    """Floats with five digits: more are noise."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
