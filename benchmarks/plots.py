"""A plot for each result file: bars of the first figure, with quartiles."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.contenders import CONTENDERS
from benchmarks.report import read_all
from benchmarks.results import FOLDER, Result, Spread
from benchmarks.workload import Workload
from benchmarks.workloads import WORKLOADS

BOUNDS, OURS, PEER = "#b8b8b8", "#2a6fbb", "#d98a3d"


def write(folder: Path = FOLDER) -> None:
    """An SVG beside each JSON file; the same figures give the same file."""
    with mpl.rc_context({"svg.hashsalt": "shardwise", "svg.fonttype": "none", "font.size": 9}):
        for name, result in read_all(folder).items():
            draw(WORKLOADS[name], result).savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def draw(workload: Workload, result: Result) -> Figure:
    """One panel for each case."""
    what, label = next(iter(workload.figures.items()))
    bars = {case: _bars(result, case, what) for case in result.cases}
    heights = [max(1, len(found)) for found in bars.values()]
    figure = Figure(figsize=(7, 0.9 * len(heights) + 0.28 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (case, found) in zip(panels, bars.items(), strict=True):
        names = list(found)[::-1]
        middles = [found[name].middle for name in names]
        errors = [
            [found[name].middle - found[name].low for name in names],
            [found[name].high - found[name].middle for name in names],
        ]
        panel.barh([CONTENDERS[name].label for name in names], middles, xerr=errors, color=[_colour(name) for name in names])
        panel.set_title(case, loc="left", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(label)
    figure.suptitle(workload.title)
    return figure


def _bars(result: Result, case: str, what: str) -> dict[str, Spread]:
    found = {name: result.spread(case, name, what) for name in result.cases[case]}
    return {name: spread for name, spread in found.items() if spread is not None}


def _colour(name: str) -> str:
    return OURS if name.startswith("shardwise") else PEER if CONTENDERS[name].peer else BOUNDS
