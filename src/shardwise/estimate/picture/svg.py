"""The picture as SVG: no script, no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from shardwise.debug.record import Collective
from shardwise.estimate.picture.lines import MARGIN, WIDTH, Place, brackets, colour, edges, ends, legend, text
from shardwise.estimate.picture.matrix import Matrix, Part
from shardwise.estimate.picture.scene import Box, Scene
from shardwise.plan.show import amount, shape

_GAP, _BETWEEN = 34, 34
_WIDEST, _LEAST, _DECK = 270, 9, 5
_BAR, _BAR_LINE = 300, 20
_ASIDE, _BELOW = 14, 4
_LETTER, _SMALL = 7.4, 6.1  # wider than most fonts need
_STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#1c2430}"
    ".name{font-weight:600}.small{font-size:11px;fill:#5c6675}.light{fill:#fff;font-weight:600}"
    ".edge{fill:none;stroke:#8a94a3;stroke-width:1.3}.bracket{fill:none;stroke:#c3c9d2;stroke-width:1.5}"
)


def to_svg(picture: Scene) -> str:
    """The picture, 1000 units wide; text is 12 units high."""
    scale = _scale(picture)
    lines = [line for row in picture.rows for line in _wrapped(row, scale)]
    places, height = _places(lines, scale)
    body = [
        *edges(picture, lines, places),
        *(part for box in picture.boxes for part in _draw(box, places[box.number], scale)),
        *brackets(lines, places),
        *ends(picture, places, height),
        *legend(picture, height + 22),
    ]
    whole = height + 58
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {whole:.0f}" width="{WIDTH}" height="{whole:.0f}" '
        f'style="min-width:760px" role="img" aria-label="{escape(picture.title)}"><title>{escape(picture.title)}</title>'
        f"<style>{_STYLE}</style>"
        '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="#8a94a3"/></marker></defs>{"".join(body)}</svg>'
    )


def _scale(picture: Scene) -> float:
    longest = max((max(one.columns, one.rows) for box in picture.boxes for one in box.matrices), default=1)
    return _WIDEST / longest


def _wrapped(row: Sequence[Box], scale: float) -> Iterator[list[Box]]:
    """`row` in as many lines as it needs."""
    line: list[Box] = []
    for box in row:
        if line and sum(_size(one, scale)[0] + _GAP for one in [*line, box]) > WIDTH - 2 * MARGIN:
            yield line
            line = []
        line.append(box)
    yield line


def _size(box: Box, scale: float) -> tuple[float, float]:
    """Width and height of a box with its words."""
    if box.kind == "collective":
        longest = max((len(_said(record)) for record in box.collectives), default=0)
        return max(_BAR, longest * _LETTER + 24), _BAR_LINE * max(len(box.collectives), 1) + 8
    if box.kind == "sum":
        return 26, 26
    if box.kind == "mix":
        return max(150, len(box.title) * _LETTER + 40), 34
    width, height = _tensors_size(box, scale)
    words = max(len(box.title) * _LETTER, *(len(line) * _SMALL for line in _words(box)))
    return max(width, words), 20 + height + 16 * len(_words(box)) + 2


def _tensors_size(box: Box, scale: float) -> tuple[float, float]:
    """Matrices beside each other, and vectors below them."""
    matrices, vectors = ([_matrix_size(one, scale) for one in group] for group in _groups(box))
    width = sum(size[0] for size in matrices) + _ASIDE * max(len(matrices) - 1, 0)
    height = max((size[1] for size in matrices), default=0) + sum(size[1] + _BELOW for size in vectors)
    return max(width, *(size[0] for size in vectors), 0), height - (0 if matrices else _BELOW)


def _groups(box: Box) -> tuple[list[Matrix], list[Matrix]]:
    matrices = [one for one in box.matrices if one.rows > 1 or one.deck > 1]
    return matrices, [one for one in box.matrices if one not in matrices]


def _matrix_size(one: Matrix, scale: float) -> tuple[float, float]:
    behind = (_cards(one) - 1) * _DECK
    return max(one.columns * scale, _LEAST) + behind, max(one.rows * scale, _LEAST) + behind


def _cards(one: Matrix) -> int:
    return min(one.deck, one.dealt or 4, 8)


def _words(box: Box) -> list[str]:
    """The lines below a module's parameters."""
    lines = []
    matrices, vectors = _groups(box)
    for one in matrices:
        name = f"{one.name}: " if len(matrices) > 1 else ""
        lines.append(f"{name}{shape(one.shape)}" + (f", {one.style}" if one.style else ""))
        lines += [f"{shape(one.local)} a rank"] if one.local != one.shape else []
    for one in vectors:
        name = f"{one.name}: " if len(box.matrices) > 1 else ""
        cut = f", {shape(one.local)} a rank" if one.local != one.shape else ""
        style = f", {one.style}" if one.style and not matrices else ""
        lines.append(f"{name}{shape(one.shape)}{cut}{style}")
    return lines + [f"▲ {_op(one)} of its gradient, {amount(one.bytes)}" for one in box.collectives]


def _op(record: Collective) -> str:
    return record.op.replace("_", "-")


def _said(record: Collective) -> str:
    arrow = {"forward": "▼", "backward": "▲", "recompute": "▼ (recomputed)"}[record.phase]
    what = " of gradients" if record.phase == "backward" else ""
    return f"{arrow} {_op(record)}{what}  {amount(record.bytes)}  {record.dtype} {shape(record.shape)}"


def _places(lines: Sequence[Sequence[Box]], scale: float) -> tuple[dict[int, Place], float]:
    places: dict[int, Place] = {}
    y = 34.0
    for line in lines:
        sizes = [_size(box, scale) for box in line]
        x = (WIDTH - sum(width + _GAP for width, _ in sizes) + _GAP) / 2
        tall = max(height for _, height in sizes)
        for box, (width, height) in zip(line, sizes, strict=True):
            places[box.number] = Place(x + width / 2, y + (tall - height) / 2, width, height)
            x += width + _GAP
        y += tall + _BETWEEN
    return places, y - _BETWEEN + 30


def _draw(box: Box, place: Place, scale: float) -> Iterator[str]:
    if box.kind == "collective":
        yield from _bar(box, place)
    elif box.kind == "sum":
        yield f'<circle cx="{place.x:.1f}" cy="{place.y + 13:.1f}" r="12" fill="#fff" stroke="#5c6675" stroke-width="1.5"/>'
        yield text(place.x, place.y + 18, "+", "name")
    elif box.kind == "mix":
        left = place.x - place.width / 2
        yield (
            f'<rect x="{left:.1f}" y="{place.y:.1f}" width="{place.width:.1f}" height="{place.height}" rx="17" fill="#eef1f5" '
            'stroke="#8a94a3"/>'
        )
        yield text(place.x, place.y + 21, box.title, "name")
    else:
        yield from _parameters(box, place, scale)


def _parameters(box: Box, place: Place, scale: float) -> Iterator[str]:
    yield text(place.x, place.y + 12, box.title, "name")
    matrices, vectors = _groups(box)
    sizes = [_matrix_size(one, scale) for one in matrices]
    x, y = place.x - (sum(width for width, _ in sizes) + _ASIDE * (len(sizes) - 1)) / 2, place.y + 20
    tall = max((height for _, height in sizes), default=0)
    for one, (width, height) in zip(matrices, sizes, strict=True):
        yield from _matrix(box, one, x, y + (tall - height) / 2, scale)
        x += width + _ASIDE
    y += tall + (_BELOW if matrices else 0)
    for one in vectors:
        width, height = _matrix_size(one, scale)
        yield from _matrix(box, one, place.x - width / 2, y, scale)
        y += height + _BELOW
    for number, line in enumerate(_words(box)):
        yield text(place.x, place.y + 20 + _tensors_size(box, scale)[1] + 14 + 16 * number, line, "small")


def _matrix(box: Box, one: Matrix, x: float, y: float, scale: float) -> Iterator[str]:
    name = escape(f"{box.module}.{one.name}" if box.module else one.name)
    yield f'<g class="matrix" data-name="{name}" data-deck="{one.deck}" data-dealt="{one.dealt}">'
    width, height = max(one.columns * scale, _LEAST), max(one.rows * scale, _LEAST)
    for behind in range(_cards(one) - 1, 0, -1):
        rank = one.dealt * behind // _cards(one) if one.dealt else None
        yield _rect(Part(rank, 0, 0, 1, 1), x + behind * _DECK, y + behind * _DECK, width, height, "card")
    for part in one.parts:
        shown = Part(0, 0, 0, 1, 1) if one.dealt else part
        yield _rect(shown, x, y, width, height, "part")
    yield "</g>"


def _rect(part: Part, x: float, y: float, width: float, height: float, kind: str) -> str:
    rank = "" if part.rank is None else f' data-rank="{part.rank}"'
    line = 0.6 if min(part.width * width, part.height * height) > 4 else 0  # which would be most of a thin piece
    return (
        f'<rect class="{kind}"{rank} x="{x + part.left * width:.2f}" y="{y + part.top * height:.2f}" '
        f'width="{part.width * width:.2f}" height="{part.height * height:.2f}" fill="{colour(part.rank)}" '
        f'stroke="#fff" stroke-width="{line}"/>'
    )


def _bar(box: Box, place: Place) -> Iterator[str]:
    passes = all(record.phase == "backward" for record in box.collectives)
    left, fill, words = place.x - place.width / 2, "#fff" if passes else "#2b3442", "" if passes else "light"
    dashes = ' stroke-dasharray="5 4"' if passes else ""
    yield (
        f'<rect x="{left:.1f}" y="{place.y:.1f}" width="{place.width}" height="{place.height}" rx="6" fill="{fill}" '
        f'stroke="#2b3442" stroke-width="1.4"{dashes}/>'
    )
    for number, record in enumerate(box.collectives):
        yield (
            f'<g class="collective" data-op="{record.op}" data-phase="{record.phase}" data-bytes="{record.bytes}">'
            f"{text(place.x, place.y + 18 + _BAR_LINE * number, _said(record), words)}</g>"
        )
