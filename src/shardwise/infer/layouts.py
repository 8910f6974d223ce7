"""Index lists as blocks that people can read: `32 x 128`, `25 x (64 + 64 + 64)`, `16 x 128 | 256 on every rank`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from shardwise.infer.islands import EVERY, Owners, of_group
from shardwise.layers import Cut
from shardwise.layout import Block

Run = tuple[int, int]
"""A component, and how many neighbouring indices it owns."""


def cuts(sides: Sequence[Owners], size: int) -> list[Cut] | None:
    """How to cut each of several dims, so that a component lies on the same one of `size` ranks in all of them.

    Each dim is a row of blocks in which the components follow each other, each with as many indices. Blocks of some of the
    components (four groups of four heads) are blocks everywhere. What the components of a group share is kept by the ranks that
    have these. None where the indices don't lie so, or a block has fewer components than there are ranks.
    """
    runs = [_runs(owners) for owners in sides]
    starts = {run[0] for side in runs for run in _firsts(side)}
    blocks = [_blocks(side, starts) for side in runs]
    found = [side for side in blocks if side is not None]
    if len(found) < len(blocks):
        return None
    dealt: set[tuple[Run, ...]] = {tuple((first, block.units) for first, block in side if first >= 0) for side in found}
    every = max(dealt, key=lambda one: len(one), default=())
    shared = {block.units for side in found for first, block in side if first < EVERY}
    if shared and (len(set(every)) > 1 or shared != _groups(sides)):  # else ranks have parts of several groups
        return None
    if any(not set(one) <= set(every) for one in dealt):
        return None
    if any(block.problem(size) for side in found for _, block in side):
        return None
    return [_cut([block for _, block in side]) for side in found]


def unfolded(cut: Cut, pieces: int, inner: int, length: int) -> Cut | None:
    """How to cut a dim along which there are `pieces` of `length` features each, of which `inner` neighbouring ones are one
    index, so that each piece is cut so. None where that falls within an index.
    """
    if pieces == inner == 1:
        return cut
    blocks = cut.blocks or (Block(length, cut.unit, cut.spread),)
    if any(block.length % inner or block.unit % inner for block in blocks):
        return None
    return _cut([Block(block.length // inner, block.unit // inner, block.spread) for block in blocks] * pieces)


def _groups(sides: Sequence[Owners]) -> set[int]:
    """How many groups share something, of each side on which they do."""
    return {len(found) for owners in sides if (found := {owner for owner in owners if owner < EVERY})}


def _runs(owners: Owners) -> list[Run]:
    return [(component, len(list(same))) for component, same in groupby(owners)]


def _firsts(runs: list[Run]) -> Iterable[Run]:
    """Where the components don't go on from the ones before."""
    before: Run | None = None
    for run in runs:
        if run[0] >= 0 and (before is None or run[0] != before[0] + 1 or run[1] != before[1]):
            yield run
        before = run


def _blocks(runs: list[Run], starts: set[int]) -> list[tuple[int, Block]] | None:
    """The blocks of one dim, each with its first component."""
    found: list[tuple[int, Block]] = []
    for component, length in runs:
        last = found[-1] if found else None
        if component == EVERY:
            found.append((EVERY, Block(length, spread="whole")))
        elif component == of_group(0):
            found.append((component, Block(length, length, "share")))
        elif component < EVERY:
            if last is None or last[0] != of_group(0) or last[1].units != of_group(component) or last[1].unit != length:
                return None
            found[-1] = (last[0], Block(last[1].length + length, length, "share"))
        elif component in starts or last is None or last[0] < 0:
            found.append((component, Block(length, length)))
        elif last[0] + last[1].units == component and last[1].unit == length:
            found[-1] = (last[0], Block(last[1].length + length, length))
        else:
            return None
    return found


def _cut(blocks: list[Block]) -> Cut:
    if len(blocks) == 1 and blocks[0].spread != "whole":
        return Cut(unit=blocks[0].unit, spread=blocks[0].spread)
    return Cut(blocks=tuple(blocks))
