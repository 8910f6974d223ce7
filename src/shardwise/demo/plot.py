"""Curves in a terminal, out of braille characters: a character is a grid of 2 x 4 dots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.text import Text

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_MARK = "●"


@dataclass(frozen=True)
class Curve:
    """A series to draw, one value a step.

    Args:
        values: what to draw.
        style: rich's word for the colour.
        kind: a line, its points alone, or marks between which a line of the same values can be seen.
    """

    values: Sequence[float]
    style: str
    kind: Literal["line", "points", "marks"] = "line"


@dataclass(frozen=True)
class Axis:
    """The vertical axis: what is drawn at the bottom and at the top, and how its ends are written."""

    bottom: float
    top: float
    label: Callable[[float], str]

    def height(self, value: float) -> float:
        """Where `value` stands: 0 at the bottom, 1 at the top."""
        share = (value - self.bottom) / (self.top - self.bottom) if self.top > self.bottom else 0.5
        return min(1.0, max(0.0, share))


def draw(curves: Sequence[Curve], axis: Axis, title: str, width: int, height: int) -> Text:
    """`height` lines of `curves` and three of frame, `width` characters wide, later curves over earlier ones."""
    labels = [axis.label(axis.top), axis.label((axis.top + axis.bottom) / 2), axis.label(axis.bottom)]
    margin = max(map(len, labels))
    cells: dict[tuple[int, int], tuple[str, str]] = {}
    columns = width - margin - 2
    for curve in curves:
        cells.update(_marks(curve, axis, columns, height) if curve.kind == "marks" else _line(curve, axis, columns, height))
    beside = {0: labels[0], (height - 1) // 2: labels[1], height - 1: labels[2]}
    picture = Text(f"{'':{margin}}  {title[:columns]:<{columns}}\n", style="bold")
    for row in range(height):
        picture.append(f"{beside.get(row, ''):>{margin}} ┤" if row in beside else f"{'':{margin}} │", style="not bold dim")
        for column in range(columns):
            character, style = cells.get((row, column), (" ", ""))
            picture.append(character, style=f"not bold {style}")
        picture.append("\n")
    steps = max(len(curve.values) for curve in curves)
    picture.append(f"{'':{margin}} └{'─' * columns}\n{'':{margin}}  1{f'step {steps}':>{columns - 1}}", style="not bold dim")
    return picture


def _line(curve: Curve, axis: Axis, columns: int, height: int) -> dict[tuple[int, int], tuple[str, str]]:
    masks: dict[tuple[int, int], int] = {}
    earlier = None
    for x in range(2 * columns):
        y = _dot(_at(curve.values, x / max(2 * columns - 1, 1)), axis, height)
        start = y if earlier is None or curve.kind == "points" else earlier
        for between in range(min(y, start), max(y, start) + 1):
            cell = (between // 4, x // 2)
            masks[cell] = masks.get(cell, 0) | _DOTS[between % 4][x % 2]
        earlier = y
    return {cell: (chr(0x2800 + mask), curve.style) for cell, mask in masks.items()}


def _marks(curve: Curve, axis: Axis, columns: int, height: int) -> dict[tuple[int, int], tuple[str, str]]:
    cells = {}
    for column in range(1, columns, 4):
        y = _dot(_at(curve.values, (2 * column + 0.5) / max(2 * columns - 1, 1)), axis, height)
        cells[y // 4, column] = (_MARK, curve.style)
    return cells


def _dot(value: float, axis: Axis, height: int) -> int:
    return round((1 - axis.height(value if math.isfinite(value) else axis.top)) * (4 * height - 1))


def _at(values: Sequence[float], share: float) -> float:
    return values[min(round(share * (len(values) - 1)), len(values) - 1)]
