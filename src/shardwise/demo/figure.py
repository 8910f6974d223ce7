"""The curves as a picture file."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shardwise.demo.checks import Trained

_ZERO = 1e-8
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"


def save_figure(found: Trained, bound: float, ranks: int, path: Path) -> None:
    """Write a PNG: the loss of both runs, and below it how far they are apart at each step, with the `bound` on that."""
    steps = range(1, len(found.whole.losses) + 1)
    apart = [max(abs(a - b), _ZERO) for a, b in zip(found.sharded.losses, found.whole.losses, strict=True)]
    figure = Figure(figsize=(8, 6.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.plot(steps, found.whole.losses, color=_BLUE, linewidth=5, alpha=0.35, label="one process", solid_capstyle="round")
    above.plot(steps, found.sharded.losses, color=_ORANGE, linewidth=1.2, label=f"tensor parallel, {ranks} ranks")
    above.set_ylabel("loss (nats per byte)")
    above.set_title(f"The same training in one process and on {ranks} ranks", loc="left", fontweight="bold")
    above.legend(frameon=False)
    below.semilogy(steps, apart, ".", color=_GREY, markersize=5, label="difference of the two losses (none: at the bottom)")
    below.axhline(bound, color=_ORANGE, linestyle="--", linewidth=1.2, label=f"bound {bound:g}")
    below.set_ylim(_ZERO / 2, bound * 100)
    below.set_ylabel("|difference|")
    below.set_xlabel("training step")
    below.legend(frameon=False, loc="upper right", ncols=2)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.margins(x=0.01)
    figure.savefig(path)
