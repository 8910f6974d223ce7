"""How a tensor looks: as y = x A is written, `in` rows and `out` columns, so that colwise cuts stand and rowwise cuts lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shardwise.plan import Plan
from shardwise.spec import ShardSpec


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of a matrix, in parts of its width and height.

    Args:
        rank: who holds it; None where every rank does.
        left, top, width, height: from 0 to 1.
    """

    rank: int | None
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Matrix:
    """A parameter, to be drawn.

    Args:
        name: in its module.
        shape, local: full, and on the first rank.
        style: of the rule that it got; "" without one.
        columns, rows: elements across and down; a single row is a vector.
        deck: how many such matrices there are, the experts; 1 of a plain one.
        dealt: of a deck, how many ranks have whole matrices of it; 0 where each matrix is cut.
        parts: that add up to the matrix, or to each of the deck.
    """

    name: str
    shape: tuple[int, ...]
    local: tuple[int, ...]
    style: str
    columns: int
    rows: int
    deck: int
    dealt: int
    parts: tuple[Part, ...]


def matrix(plan: Plan, row: ShardSpec, name: str, transposed: bool) -> Matrix:
    """The parameter `name` of a module whose row is `row`; `transposed`: its module keeps the weight as (in, out)."""
    long = [dim for dim, length in enumerate(row.shape) if length > 1]
    cut = row.layout.cut(row.shape)
    dim = cut[0] if cut is not None else None
    size = plan.place(row, 0)[1]
    deck = long[0] if len(long) > 2 and row.shape[long[0]] > 1 else None
    flat = [one for one in long if one != deck][:2]
    style = row.rule.style if row.rule else ""
    across, down = _sides(flat, dim, style, transposed)
    dealt = size if deck is not None and dim == deck else 0
    parts = (Part(None, 0, 0, 1, 1),) if dealt else tuple(_parts(row, size, lying=dim is not None and dim == down))
    return Matrix(
        name,
        row.shape,
        plan.local_shape(row, 0),
        style,
        row.shape[across] if across is not None else 1,
        row.shape[down] if down is not None else 1,
        row.shape[deck] if deck is not None else 1,
        dealt,
        parts,
    )


def _sides(flat: list[int], cut: int | None, style: str, transposed: bool) -> tuple[int | None, int | None]:
    """The dims that go across (out) and down (in)."""
    if len(flat) < 2:
        return (flat[0] if flat else None), None
    first, second = flat
    if cut in flat and "colwise" in style:
        return cut, first + second - cut
    if cut in flat and "rowwise" in style:
        return first + second - cut, cut
    return (second, first) if transposed else (first, second)


def _parts(row: ShardSpec, size: int, lying: bool) -> Iterator[Part]:
    cut = row.layout.cut(row.shape)
    if cut is None:
        yield Part(None, 0, 0, 1, 1)
        return
    length, kept = row.shape[cut[0]], set[tuple[int, int]]()
    for rank in range(size):
        for piece in row.layout.pieces(row.shape, rank, size):
            start, long = piece.full.start / length, (piece.full.stop - piece.full.start) / length
            if piece.copies == size > 1:
                if (piece.full.start, piece.full.stop) not in kept:
                    kept.add((piece.full.start, piece.full.stop))
                    yield _part(None, start, long, 0, 1, lying)
            else:  # of ranks that hold the same, each has its share of the other side
                yield _part(rank, start, long, rank % piece.copies / piece.copies, 1 / piece.copies, lying)


def _part(rank: int | None, start: float, long: float, aside: float, share: float, lying: bool) -> Part:
    return Part(rank, aside, start, share, long) if lying else Part(rank, start, aside, long, share)
