"""docs/performance.md, from its template and the result files: every figure in it comes from them."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from benchmarks import report
from benchmarks.process import ROOT
from benchmarks.results import FOLDER
from benchmarks.workloads import WORKLOADS

TEMPLATE = Path(__file__).parent / "performance.md.j2"
PAGE = ROOT / "docs" / "performance.md"


def write() -> None:
    """Write the page."""
    PAGE.write_text(render())


def render(folder: Path = FOLDER) -> str:
    """The page, from the results in `folder`. What was not measured is said to be so."""
    results = report.read_all(folder)

    def section(name: str) -> str:
        """Tables, targets and plot of a workload."""
        if name not in results:
            return "Not measured yet."
        workload, result = WORKLOADS[name], results[name]
        lines = [report.setting(result), ""]
        for case in result.cases:
            lines += [f"**{case}**", "", *report.figures(workload, result, case), ""]
        if workload.targets:
            lines += [*report.targets(workload, result), ""]
        return "\n".join([*lines, f"![{workload.title}](../benchmarks/results/cpu/{name}.svg)"])

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(TEMPLATE.read_text()).render(section=section, workloads=WORKLOADS)
