"""Medians of what the ranks measured, and a table of them."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from benchmarks.overlap.measure import Seen, Setting

HIDEABLE = 2
"""All-reduces of a layer that run while weight gradients are computed: of four, those in front of q, k, v and of gate, up."""


@dataclass(frozen=True)
class Row:
    """Of one delay, in milliseconds: medians of a step and of what it waited for collectives, without overlap and with it; the
    median of the differences of neighbouring steps; and what of a layer's waiting was hidden, of what could be.
    """

    delay: float
    plain: float
    overlapped: float
    plain_blocked: float
    overlapped_blocked: float
    saved: float
    hidden_a_layer: float
    hideable_a_layer: float


def rows(setting: Setting, seen: Seen) -> list[Row]:
    """One for each delay."""
    made = []
    for delay in setting.delays:
        plain, overlapped = seen.plain[delay], seen.overlapped[delay]
        blocked = [median(step.blocked for step in steps) for steps in (plain, overlapped)]
        made.append(
            Row(
                delay,
                median(step.total for step in plain),
                median(step.total for step in overlapped),
                *blocked,
                median(a.total - b.total for a, b in zip(plain, overlapped, strict=True)),
                (blocked[0] - blocked[1]) / setting.layers,
                HIDEABLE * delay,
            )
        )
    return made


def table(setting: Setting, lines: list[Row], weight_gradients: float) -> str:
    """The rows in Markdown."""
    size = f"{setting.layers} x {setting.width}, {setting.batch} x {setting.tokens} tokens, one rank of {setting.ranks}"
    late = f"{weight_gradients / setting.layers:.2f} ms of weight gradients a layer can run during its all-reduces"
    head = ["delay", "step", "with overlap", "saved", "waited", "with overlap", "hidden a layer", "of"]
    cells = [head, ["---:"] * len(head)]
    for line in lines:
        waited = line.plain_blocked, line.overlapped_blocked, line.hidden_a_layer, line.hideable_a_layer
        figures = (line.delay, line.plain, line.overlapped, line.saved, *waited)
        cells.append([f"{figure:.2f}" for figure in figures])
    return "\n".join([f"{size}; {late}. Milliseconds.", "", *(f"| {' | '.join(row)} |" for row in cells)])
