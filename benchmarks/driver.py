"""One run: every contender of a case is built, then they take turns, a round each, while the others wait for a request."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.contenders import CONTENDERS
from benchmarks.group import Group
from benchmarks.models import write_checkpoints
from benchmarks.process import Reply
from benchmarks.workload import Case, Effort, Ranks, Workload

START, PREPARE, ROUND = 300.0, 1200.0, 900.0
"""Seconds that a contender gets to start, to build and compile a case, and for a round."""


@dataclass
class Found:
    """Of one contender in one case: for each figure the median of every round's steps, facts that have no rounds, and notes."""

    versions: dict[str, str] = field(default_factory=dict)
    backend: str = ""
    error: str = ""
    facts: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, replies: list[Reply]) -> None:
        """A round: of each step the slowest rank counts, and of all steps the median."""
        steps = [_slowest(samples) for samples in zip(*(_samples(reply) for reply in replies), strict=True)]
        for figure in steps[0]:
            self.rounds.setdefault(figure, []).append(median(step[figure] for step in steps))


@dataclass
class Run:
    """How a run is done.

    Args:
        pythons: the interpreter of every contender that takes part; of others there are no results.
        folder: for checkpoints and logs.
        say: told what is happening.
    """

    pythons: dict[str, Path]
    folder: Path
    effort: Effort
    say: Callable[[str], None]
    groups: dict[str, Group] = field(default_factory=dict)
    ranks: Ranks | None = None

    def measure(
        self, workloads: Iterable[Workload], large: bool, save: Callable[[Workload, dict[str, dict[str, Found]]], None]
    ) -> None:
        """Measure all cases, those of the same ranks one after the other, and hand each workload's results to `save`."""
        jobs = [(workload, case) for workload in workloads for case in workload.cases if self._wanted(case, large)]
        write_checkpoints([model for _, case in jobs for model in (case.model, *case.also)], self.folder)
        order = list(dict.fromkeys(case.ranks for _, case in jobs))
        found: dict[str, dict[str, dict[str, Found]]] = {}
        try:
            for workload, case in sorted(jobs, key=lambda job: order.index(job[1].ranks)):
                cases = found.setdefault(workload.name, {})
                cases[case.name] = self._case(workload, case)
                save(workload, {name: cases[name] for name in (case.name for case in workload.cases) if name in cases})
        finally:
            self._close(list(self.groups))

    def _wanted(self, case: Case, large: bool) -> bool:
        return (large or not case.large) and self.effort in case.efforts

    def _case(self, workload: Workload, case: Case) -> dict[str, Found]:
        rounds, steps = workload.effort(self.effort)
        names = [name for name in case.contenders or workload.contenders if name in self.pythons]
        self._start(names, case.ranks)
        found = {name: Found(self.groups[name].versions) for name in names}
        self.say(f"{workload.name}, {case.name}")
        for name in names:
            self._prepare(name, case, found[name])
        alive = [name for name in names if not found[name].error]
        for _ in range(rounds):
            random.shuffle(alive)
            for name in [name for name in alive if not found[name].error]:
                self._ask(name, found[name], ROUND, found[name].add, do="round", steps=steps)
        for name in alive:
            self._ask(name, found[name], START, None, do="drop")
        self._close([name for name in names if found[name].error])
        return found

    def _prepare(self, name: str, case: Case, found: Found) -> None:
        def note(replies: list[Reply]) -> None:
            facts, notes = replies[0]["facts"], replies[0]["notes"]
            assert isinstance(facts, dict)
            assert isinstance(notes, dict)
            found.facts, found.notes, found.backend = facts, notes, str(replies[0]["backend"])

        if self.groups[name].error:
            found.error = self.groups[name].error
        else:
            model = str(self.folder / case.model.name)
            self._ask(name, found, PREPARE, note, do="prepare", task=case.task, model=model, options=case.options)
        self.say(f"  {name}: {found.error or 'ready'}")

    def _ask(
        self, name: str, found: Found, seconds: float, use: Callable[[list[Reply]], None] | None, **request: object
    ) -> None:
        """Ask a group; what it answers is used, unless it failed."""
        group = self.groups[name]
        replies = group.ask(seconds, **request)
        if group.error:
            found.error = group.error
        elif use is not None:
            use(replies)

    def _start(self, names: list[str], ranks: Ranks) -> None:
        """The groups of `names`, started side by side where they are not there yet; those of other ranks are ended."""
        if ranks != self.ranks:
            self._close(list(self.groups))
        self.ranks = ranks
        new = [name for name in names if name not in self.groups]
        for name in new:
            self.groups[name] = Group(CONTENDERS[name], ranks, self.pythons[name], self.folder / "logs")
        for name in new:
            self.groups[name].meet(START)

    def _close(self, names: list[str]) -> None:
        for name in names:
            self.groups.pop(name).close()


def _samples(reply: Reply) -> list[dict[str, float]]:
    samples = reply["samples"]
    assert isinstance(samples, list)
    return samples


def _slowest(ranks: tuple[dict[str, float], ...]) -> dict[str, float]:
    return {figure: max(rank[figure] for rank in ranks) for figure in ranks[0]}
