"""What a rank says about the call that it is in: two words, which the others compare with their own."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

KINDS = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "all_to_all",
    "barrier",
)

OPS = ("", "SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")

DTYPES = tuple(sorted((value for value in vars(torch).values() if isinstance(value, torch.dtype)), key=str))

_NUMBER = {dtype: number for number, dtype in enumerate(DTYPES)}


class Call(NamedTuple):
    """One collective call, as far as all ranks must agree on it.

    Args:
        kind: one of `KINDS`.
        elements: how many one rank brings or takes, whichever is the same everywhere; 0 where that is nothing.
        op: the reduction, one of `OPS`.
        root: the rank that it starts from or ends at, within the group; -1 for none.
    """

    kind: str
    dtype: torch.dtype = torch.uint8
    elements: int = 0
    op: str = ""
    root: int = -1

    @property
    def code(self) -> int:
        """Everything but the number of elements, as one word."""
        return _code(self.kind, self.dtype, self.op, self.root)

    @classmethod
    def decode(cls, code: int, elements: int) -> Call:
        """The call that these two words stand for."""
        return cls(KINDS[code & 0xFF], DTYPES[code >> 8 & 0xFFF], elements, OPS[code >> 20 & 0xF], (code >> 24) - 1)

    def __str__(self) -> str:
        if self.kind == "barrier":
            return "barrier"
        name = str(self.dtype).removeprefix("torch.")
        what = [f"{self.elements} x {name}" if self.kind != "all_to_all" else name]
        if self.op:
            what.append(self.op)
        if self.root >= 0:
            what.append(f"root {self.root}")
        return f"{self.kind}({', '.join(what)})"


@cache
def _code(kind: str, dtype: torch.dtype, op: str, root: int) -> int:
    return KINDS.index(kind) | _NUMBER[dtype] << 8 | OPS.index(op) << 20 | (root + 1) << 24
