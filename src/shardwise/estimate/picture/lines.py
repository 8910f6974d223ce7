"""What connects and explains the boxes of a picture: where they stand, the lines between them, brackets and the legend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from shardwise.estimate.flow import INPUT
from shardwise.estimate.picture.scene import Box, Scene

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#eeca3b")
WHOLE = "#d3d8df"
WIDTH, MARGIN = 1000, 70
_LEGEND = 16


@dataclass(frozen=True)
class Place:
    """Where a box stands: the middle, the top, and its size."""

    x: float
    y: float
    width: float
    height: float

    @property
    def bottom(self) -> float:
        """Where it ends."""
        return self.y + self.height


def colour(rank: int | None) -> str:
    """Of a rank; of what every rank holds."""
    if rank is None:
        return WHOLE
    return COLOURS[rank] if rank < len(COLOURS) else f"hsl({rank * 47 % 360} 45% {45 + rank * 13 % 25}%)"


def edges(picture: Scene, lines: Sequence[Sequence[Box]], places: dict[int, Place]) -> Iterator[str]:
    """An arrow to each box from what it needs; those that pass a row go around, on the left."""
    row_of = {box.number: number for number, line in enumerate(lines) for box in line}
    tops = [min(places[box.number].y for box in line) for line in lines]
    bottoms = [max(places[box.number].bottom for box in line) for line in lines]
    lane = 0
    for box in picture.boxes:
        here, to = row_of[box.number], places[box.number]
        for one in sorted(box.inputs):
            start = WIDTH / 2 if one == INPUT else places[one].x
            above = -1 if one == INPUT else row_of[one]
            begin = 26.0 if one == INPUT else places[one].bottom
            if here - above <= 1:
                middle = tops[here] - 10 - 5 * (lines[here].index(box) % 3)  # lines to different boxes don't meet
                yield _path([(start, begin), (start, middle), (to.x, middle), (to.x, to.y - 2)])
                continue
            lane += 1
            x = 12 + 11 * ((lane - 1) % 5)
            leave = begin + 7 if one == INPUT else bottoms[above] + 8
            arrive = (to.x - to.width / 2 - 2, to.y + to.height / 2)
            if box.kind == "sum" and len(lines[here]) == 1:
                yield _path([(start, begin), (start, leave), (x, leave), (x, arrive[1]), arrive])
            else:
                into = tops[here] - 8
                yield _path([(start, begin), (start, leave), (x, leave), (x, into), (to.x - 6, into), (to.x - 6, to.y - 2)])


def _path(points: Sequence[tuple[float, float]]) -> str:
    steps = " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<path class="edge" d="M{steps}" marker-end="url(#to)"/>'


def brackets(lines: Sequence[Sequence[Box]], places: dict[int, Place]) -> Iterator[str]:
    """On the right, which part of the layer it is."""
    runs: list[tuple[str, float, float]] = []
    for line in lines:
        names = {box.module.split(".")[0] for box in line if "." in box.module or box.kind == "mix"}
        top, bottom = min(places[box.number].y for box in line), max(places[box.number].bottom for box in line)
        name = names.pop() if len(names) == 1 else ""
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1], bottom)
        else:
            runs.append((name, top, bottom))
    for name, top, bottom in runs:
        if name:
            x, middle = WIDTH - 30, (top + bottom) / 2
            yield f'<path class="bracket" d="M{x - 8},{top:.1f} L{x},{top:.1f} L{x},{bottom:.1f} L{x - 8},{bottom:.1f}"/>'
            yield (
                f'<text class="name" text-anchor="middle" transform="translate({x + 16},{middle:.1f}) rotate(90)">'
                f"{escape(name)}</text>"
            )


def ends(picture: Scene, places: dict[int, Place], height: float) -> Iterator[str]:
    """Where the layer begins and ends."""
    yield text(WIDTH / 2, 16, "hidden states", "small")
    last = places[picture.last]
    yield _path([(last.x, last.bottom), (last.x, height - 12)])
    yield text(last.x, height + 2, "to the next layer", "small")


def legend(picture: Scene, y: float) -> Iterator[str]:
    """Whose colours these are."""
    x = float(MARGIN)
    shown = list(range(min(picture.ranks, _LEGEND)))
    for rank in (*shown, None):
        name = "whole on every rank" if rank is None else str(rank) if rank else "rank 0"
        yield f'<rect x="{x:.1f}" y="{y:.1f}" width="12" height="12" fill="{colour(rank)}"/>'
        yield f'<text class="small" x="{x + 17:.1f}" y="{y + 10:.1f}">{name}</text>'
        x += 17 + len(name) * 6.2 + 14
    words = "▼ in forward  ▲ in backward; a dashed bar lets forward pass"
    yield f'<text class="small" x="{x + 6:.1f}" y="{y + 10:.1f}">{words}</text>'


def text(x: float, y: float, words: str, kind: str) -> str:
    """Words in the middle of `x`, standing on `y`."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(words)}</text>'
