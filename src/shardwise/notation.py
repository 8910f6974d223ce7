"""How cuts and numbers are written in files, for people: printed and read here alone.

    units of 64                      one matrix, 64 neighbouring indices stay together
    12 units                         the same of a matrix of 768 indices: 12 equal parts
    16 x 128 | 256 on every rank     fused: sixteen heads of 128, then 256 indices that no rank goes without
    25 x (64 + 64 + 64)              q, k and v head by head: units of 192
    8 times 96                       the same block over and over: eight experts below one another
    dim 1: units of 1                of a tensor whose style would cut another dim
    6, 6 of 12                       a number that becomes local: on each rank, of how many

A word at the end of a cut or a block says what becomes of fewer units than ranks, see `shardwise.layout.Block`: `shared`,
`padded`, `on every rank` (or `whole`). Where a number stands, an expression may: `3 * head_dim`, `config.hidden_size / 4`; what
its names mean, the reader says.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType

from shardwise.layers import Cut
from shardwise.layout import Block, Spread

Lookup = Callable[[str], int]
"""The value of a name in an expression. Raises `ValueError` for a name that means nothing."""

_WORDS: Mapping[str, Spread] = MappingProxyType(
    {" shared": "share", " padded": "pad", " on every rank": "whole", " whole": "whole"}
)
_DIM = re.compile(r"dim (\d+): ")
_MANY = 4
"""From one more equal blocks on, they are counted."""
_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = MappingProxyType(
    {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
)


def write_cut(cut: Cut) -> str:
    """`cut` as text; whether a weight is stored transposed is no part of it."""
    along = "" if cut.dim is None else f"dim {cut.dim}: "
    if cut.blocks:
        runs = ((str(block), len(list(same))) for block, same in groupby(cut.blocks))
        return along + " | ".join(text for block, count in runs for text in _run(block, count))
    word = next((word for word, spread in _WORDS.items() if spread == cut.spread), "")
    return f"{along}units of {cut.unit}{word}"


def _run(block: str, count: int) -> list[str]:
    return [f"{count} times {block}"] if count > _MANY else [block] * count


def read_cut(text: str, length: int | None = None, names: Lookup | None = None) -> Cut:
    """The cut that `text` says.

    Args:
        text: as in this module's docstring.
        length: indices along the cut dim, of which "12 units" are equal parts.
        names: what the names in it mean; by default there are none.

    Raises `ValueError` for anything else, saying why.
    """
    dim = cut_dim(text)
    rest, spread = _word(re.sub(_DIM, "", text.strip()))
    if found := re.fullmatch(r"units of (.+)", rest):
        return Cut(_positive(found[1], names), spread, dim=dim)
    if found := re.fullmatch(r"(.+) units?", rest):
        count = _positive(found[1], names)
        if length is None or length % count:
            raise ValueError(f"{text!r}: {length} indices are not {count} equal units")
        return Cut(length // count, spread, dim=dim)
    parts = re.sub(_DIM, "", text.strip()).split("|")
    return Cut(blocks=tuple(block for part in parts for block in _blocks(part.strip(), names)), dim=dim)


def cut_dim(text: str) -> int | None:
    """The dim that a cut names itself; None where its style says which."""
    found = re.match(_DIM, text.strip())
    return int(found[1]) if found else None


def _blocks(text: str, names: Lookup | None) -> tuple[Block, ...]:
    count, _, block = text.rpartition(" times ")
    return (_block(block, names),) * (_positive(count, names) if count else 1)


def _block(text: str, names: Lookup | None) -> Block:
    rest, spread = _word(text)
    count, *unit = re.split(r"\sx\s", rest)
    if len(unit) > 1:
        raise ValueError(f"{text!r}: a block is LENGTH, or COUNT x UNIT")
    size = _positive(unit[0], names) if unit else 1
    return Block(_positive(count, names) * size, size, spread)


def _word(text: str) -> tuple[str, Spread]:
    word = next((word for word in _WORDS if text.endswith(word)), "")
    return text.removesuffix(word), _WORDS.get(word, "split")


def write_local(values: Sequence[int | None], of: int | None) -> str:
    """A number of a module that becomes local, "6, 6 of 12"; "6, 6" of one that the module has not in one process."""
    return ", ".join(map(str, values)) + ("" if of is None else f" of {of}")


def read_local(text: str) -> tuple[tuple[int, ...], int | None]:
    """The values on the ranks, and what the number is in one process. Raises `ValueError` for what is not written so."""
    found = re.fullmatch(r"\s*(\d+(?:\s*,\s*\d+)*)(?:\s+of\s+(\d+))?\s*", text)
    if found is None:
        raise ValueError(f"{text!r}: a number for each rank, and of how many, as in '6, 6 of 12'")
    return tuple(map(int, found[1].split(","))), int(found[2]) if found[2] else None


def evaluate(text: str, names: Lookup | None = None) -> int:
    """The value of an expression of integers and names with + - * / and parentheses. Raises `ValueError` for anything else, and
    for a division with a remainder.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no expression") from error
    return _value(tree.body, names, text)


def _positive(text: str, names: Lookup | None) -> int:
    value = evaluate(text, names)
    if value < 1:
        raise ValueError(f"{text!r} is {value}, which is no length")
    return value


def _value(node: ast.expr, names: Lookup | None, text: str) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name | ast.Attribute) and names is not None:
        return names(ast.unparse(node))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, names, text), _value(node.right, names, text)
        if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](left, right)
        if isinstance(node.op, ast.Div) and right and left % right == 0:
            return left // right
        raise ValueError(f"{text!r}: {ast.unparse(node)} is {left} and {right}, which does not come out even")
    raise ValueError(f"{text!r}: {ast.unparse(node)!r} is no number")
