"""The pictures of the page, as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from shardwise.profiling.breakdown import Found
from shardwise.profiling.intervals import Interval, clip, subtract, union

if TYPE_CHECKING:
    from shardwise.profiling.result import Comparison, Profile

COLOURS = {"compute": "#0072B2", "transfer": "#009E73", "wait": "#D55E00", "host": "#C8CDD3"}
_WIDTH = 11.0
_FINEST = 1 / 1500
"""Of a picture's width: pieces of time closer to each other than this are drawn as one."""


def step_bars(result: Comparison) -> str:
    """The median step of each cell, and each step as a point."""
    cells = result.profiles
    figure, axes = _figure(0.42 * len(cells) + 0.9)
    places = range(len(cells))
    colours = ["#0072B2" if one.cell.contender == "shardwise" else "#9AA5B1" for one in cells]
    axes.barh(places, [one.step * 1e3 for one in cells], color=colours, height=0.62)
    for place, one in zip(places, cells, strict=True):
        axes.plot([second * 1e3 for second in one.seconds], [place] * len(one.seconds), "|", color="black", markersize=8)
        axes.annotate(f"{one.step * 1e3:.3g} ms", (0, place), (6, 0), textcoords="offset points", va="center", color="white")
    _names(axes, [str(one.cell) for one in cells])
    axes.set_xlabel("ms a step, without the profiler; marks: single steps")
    return _svg(figure)


def breakdown_bars(result: Comparison) -> str:
    """What the profiled step of each cell went to."""
    cells = result.profiles
    figure, axes = _figure(0.42 * len(cells) + 1.2)
    left = [0.0] * len(cells)
    for name, colour in COLOURS.items():
        width = [fmean(getattr(rank, name) for rank in one.analysis.ranks) / 1e3 for one in cells]
        axes.barh(range(len(cells)), width, left=left, color=colour, height=0.62, label=name)
        left = [a + b for a, b in zip(left, width, strict=True)]
    _names(axes, [str(one.cell) for one in cells])
    axes.set_xlabel("ms in the profiled step, mean over the ranks")
    _legend(axes)
    return _svg(figure)


def layer_bars(profile: Profile) -> str:
    """What each layer took, forward and backward beside each other; "" where no layers are seen."""
    parts = [part for part in profile.analysis.layers if part.name]
    names = list(dict.fromkeys(part.name for part in parts))
    phases = list(dict.fromkeys(part.phase for part in parts))
    if not names:
        return ""
    figure, axes = _figure(3.2)
    width = 0.8 / len(phases)
    for number, phase in enumerate(phases):
        of_phase = {part.name: part for part in parts if part.phase == phase}
        places = [index + (number - (len(phases) - 1) / 2) * width for index, name in enumerate(names) if name in of_phase]
        bottom = [0.0] * len(of_phase)
        for what, colour in COLOURS.items():
            height = [getattr(of_phase[name], what) / 1e3 for name in names if name in of_phase]
            axes.bar(places, height, width * 0.92, bottom=bottom, color=colour, label=what if number == 0 else None)
            bottom = [a + b for a, b in zip(bottom, height, strict=True)]
    step = max(1, len(names) // 16)
    axes.set_xticks(range(0, len(names), step), [name.rpartition(".")[2] for name in names][::step])
    axes.set_xlabel(f"layer; from left to right in each: {', '.join(phases)}")
    axes.set_ylabel("ms, mean over the ranks")
    _legend(axes)
    return _svg(figure)


def timeline(profile: Profile, most_ranks: int = 8) -> str:
    """What each rank did when, on the common clock."""
    found = profile.found[:most_ranks]
    zero, end = min(one.trace.start for one in found), max(one.trace.end for one in found)
    figure, axes = _figure(0.42 * len(found) + 1.2)
    for place, one in enumerate(found):
        axes.broken_barh(
            [((one.trace.start - zero) / 1e3, (one.trace.end - one.trace.start) / 1e3)],
            (place - 0.31, 0.62),
            color=COLOURS["host"],
            label="host" if place == 0 else None,
        )
        for name, spans in _spans(one).items():
            shown = [((a - zero) / 1e3, (b - a) / 1e3) for a, b in _coarse(spans, (end - zero) * _FINEST)]
            axes.broken_barh(shown, (place - 0.31, 0.62), color=COLOURS[name], label=name if place == 0 else None)
    _names(axes, [f"rank {one.trace.rank}" for one in found])
    axes.set_xlim(0, (end - zero) / 1e3)
    axes.set_xlabel("ms since the first rank began")
    _legend(axes)
    return _svg(figure)


def _spans(found: Found) -> dict[str, list[Interval]]:
    compute, window = found.compute(), (found.trace.start, found.trace.end)
    waits = [span for call in found.calls for span in clip(call.blocked, call.start, call.arrived)]
    rest = subtract((span for call in found.calls for span in call.blocked), waits)
    return {
        "compute": compute,
        "transfer": subtract(clip(rest, *window), compute),
        "wait": subtract(clip(waits, *window), compute),
    }


def _coarse(spans: Sequence[Interval], finest: float) -> list[Interval]:
    joined = union((start, end + finest) for start, end in spans)
    return [(start, end - finest) for start, end in joined]


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="both", alpha=0.25)
    return figure, axes


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "shardwise", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
