"""Tables from the result files."""

from __future__ import annotations

from pathlib import Path

from benchmarks.contenders import CONTENDERS
from benchmarks.driver import Found
from benchmarks.markdown import number, table
from benchmarks.results import FOLDER, Result, Spread
from benchmarks.targets import verdicts
from benchmarks.workload import Workload
from benchmarks.workloads import WORKLOADS

HEAD = """# Results on CPUs

Written by `python -m benchmarks report` from the JSON files beside it. Each cell is the median over the rounds of a round's
median step (first to third quartile); *x floor* is the median of the ratios to the floor of the same round. What the figures
mean, what bounds them and how to repeat them: [docs/performance.md](../../../docs/performance.md).
"""


def write(folder: Path = FOLDER) -> Path:
    """Write README.md; its path."""
    path = folder / "README.md"
    path.write_text(render(folder))
    return path


def render(folder: Path = FOLDER) -> str:
    """The tables of all result files that are there."""
    results = read_all(folder)
    lines = [HEAD]
    for name, result in results.items():
        workload = WORKLOADS[name]
        lines += [f"## {workload.title}", "", setting(result), ""]
        for case in result.cases:
            lines += [f"### {case}", "", *figures(workload, result, case), ""]
        if workload.targets:
            lines += [*targets(workload, result), ""]
        if (folder / f"{name}.svg").exists():
            lines += [f"![{workload.title}]({name}.svg)", ""]
    return "\n".join(lines).rstrip() + "\n"


def read_all(folder: Path = FOLDER) -> dict[str, Result]:
    """The results that are there, in the order of the workloads."""
    found = {name: Result.read(name, folder) for name in WORKLOADS}
    return {name: result for name, result in found.items() if result is not None}


def setting(result: Result) -> str:
    """The machine and the versions, in a line."""
    torch = {found.versions.get("torch", "") for case in result.cases.values() for found in case.values()} - {""}
    facts = result.machine
    words = [str(facts["cpu"]), f"{facts['cores']} cores", f"torch {', '.join(sorted(torch))}", f"{result.effort} run"]
    return f"{', '.join(words)}."


def figures(workload: Workload, result: Result, case: str) -> list[str]:
    """The table of a case: a row for each contender, a column for each figure that some contender has; notes below."""
    contenders = result.cases[case]
    there = [
        what for what in workload.figures if any(what in found.rounds or what in found.facts for found in contenders.values())
    ]
    if not there:
        there = list(workload.figures)[:1]
    against_floor = "floor" in contenders and result.spread(case, "floor", there[0]) is not None
    heads = ["", *(workload.figures[what] for what in there)]
    heads[2:2] = ["x floor"] if against_floor else []
    reference = next((one.reference for one in workload.cases if one.name == case), {})
    heads += ["reference"] if reference else []
    rows = [_row(result, case, name, there, against_floor) for name in contenders]
    backends = [_cpu_backend(found) for found in contenders.values()]
    if set(backends) - {"", "fake"}:
        heads.insert(1, "backend")
        rows = [[row[0], backend, *row[1:]] for row, backend in zip(rows, backends, strict=True)]
    if reference:
        rows = [
            [*row, number(reference[name]) if name in reference else ""] for row, name in zip(rows, contenders, strict=True)
        ]
    notes = [
        f"- {CONTENDERS[name].label}: {what}: {why}" for name, found in contenders.items() for what, why in found.notes.items()
    ]
    return [*table(heads, rows), *([""] if notes else []), *notes]


def _row(result: Result, case: str, name: str, there: list[str], against_floor: bool) -> list[str]:
    error = result.cases[case][name].error
    cells = [said(result.spread(case, name, what)) for what in there]
    if error:
        cells[0] = error
    ratio = result.ratio(case, name, "floor", there[0])
    cells[1:1] = ([f"{ratio.middle:.2f}" if ratio else ""]) if against_floor else []
    return [CONTENDERS[name].label, *cells]


def _cpu_backend(found: Found) -> str:
    """Of "cpu:gloo,cuda:nccl" it is gloo."""
    return dict(part.split(":") for part in found.backend.split(",") if part).get("cpu", "")


def said(spread: Spread | None) -> str:
    """A median, and where there is a spread the quartiles."""
    if spread is None:
        return ""
    if spread.low == spread.high:
        return number(spread.middle)
    return f"{number(spread.middle)} ({number(spread.low)} to {number(spread.high)})"


def targets(workload: Workload, result: Result) -> list[str]:
    """The table of what is asked, and whether it is met."""
    rows = [
        [verdict.case, verdict.asked, "" if verdict.value is None else f"{verdict.value:.3g}", verdict.said]
        for verdict in verdicts(workload, result)
    ]
    return table(["case", "asked", "measured", ""], rows)
