"""A web page that stands alone: no network, no script, readable from a disk."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import shardwise.report


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: its heading.
        text: a paragraph below it; "" for none.
        headings: of a table's columns.
        rows: of that table, as text; a cell that is a number is set to the right. `Markup` is taken as HTML.
        picture: HTML of a figure: an `svg`, or an `img` with its data inside.
    """

    title: str
    text: str = ""
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    picture: str = ""

    @property
    def markup(self) -> Markup:
        """The picture, as HTML."""
        return Markup(self.picture)


@dataclass(frozen=True)
class Page:
    """A report: a title, a sentence that says what came out, and sections.

    Attributes:
        title: what it is about.
        verdict: what came out, in a sentence.
        good: whether that is as it should be; None where there is nothing to judge.
        sections: in order.
    """

    title: str
    verdict: str = ""
    good: bool | None = None
    sections: Sequence[Section] = field(default=())

    def to_html(self) -> str:
        """The page."""
        folder = PackageLoader(shardwise.report.__name__, package_path="")
        templates = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        return templates.get_template("page.html.j2").render(page=self, is_number=is_number)

    def save(self, path: str | os.PathLike[str]) -> None:
        """`to_html`, to a file."""
        Path(path).write_text(self.to_html(), encoding="utf-8")


def is_number(text: str) -> bool:
    """Whether a cell is set to the right: "1,024", "0.5", "3 %", "1.0e-04", "-", but no "2 x 3"."""
    plain = text.replace(",", "").removesuffix("%").strip()
    return plain == "-" or re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", plain) is not None
