"""Whether what was asked for is met: worked out from the results, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.contenders import CONTENDERS, PEERS
from benchmarks.results import Result
from benchmarks.workload import Target, Workload

BEST_PEER = "best peer"


@dataclass(frozen=True)
class Verdict:
    """A target in one case; `value` is None where it was not measured."""

    case: str
    asked: str
    value: float | None
    met: bool

    @property
    def said(self) -> str:
        """In one word or two."""
        return "not measured" if self.value is None else "met" if self.met else "**not met**"


def verdicts(workload: Workload, result: Result) -> list[Verdict]:
    """Every target in every case that was measured."""
    return [
        _verdict(workload, target, result, case)
        for target in workload.targets
        for case in result.cases
        if case in (target.cases or result.cases)
    ]


def _verdict(workload: Workload, target: Target, result: Result, case: str) -> Verdict:
    value = _value(target, result, case)
    met = value is not None and (value >= target.limit if target.at_least else value <= target.limit)
    return Verdict(case, _asked(workload, target), value, met)


def _value(target: Target, result: Result, case: str) -> float | None:
    if not target.against:
        found = result.spread(case, target.contender, target.what)
    else:
        other = _best_peer(target, result, case) if target.against == BEST_PEER else target.against
        found = result.ratio(case, target.contender, other, target.what) if other else None
    return None if found is None else found.middle


def _best_peer(target: Target, result: Result, case: str) -> str | None:
    found = {peer: result.spread(case, peer, target.what) for peer in PEERS}
    middles = {peer: spread.middle for peer, spread in found.items() if spread is not None}
    return min(middles, key=lambda peer: middles[peer], default=None)


def _asked(workload: Workload, target: Target) -> str:
    who = CONTENDERS[target.contender].label
    bound = "at least" if target.at_least else "at most"
    what = workload.figures.get(target.what, target.what)
    if not target.against:
        return f"{who}: {what}: {bound} {target.limit:.4g}"
    other = CONTENDERS[target.against].label.partition(":")[0] if target.against in CONTENDERS else "the best peer"
    return f"{who}: {what}: {bound} {target.limit:.3g} x {other}"
