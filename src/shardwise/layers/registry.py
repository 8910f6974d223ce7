"""Styles by name: the built-in ones, and those that users add."""

from __future__ import annotations

from shardwise.errors import PlanError, describe
from shardwise.layers import STYLES
from shardwise.layers.base import ParallelStyle

# The one registry that users write to; a plan is a text, so a style has to be found by its name.
_registered: dict[str, type[ParallelStyle]] = {}


def register_style(name: str, style: type[ParallelStyle]) -> None:
    """Make `style` available to plans as `name`. Registering the same class again is no error.

    Raises `PlanError` when the name belongs to another style.
    """
    kind: object = style
    if not (isinstance(kind, type) and issubclass(kind, ParallelStyle)):
        found = repr(kind) if isinstance(kind, type | str) else f"an instance of {type(kind).__name__}"
        raise PlanError(f"register_style({name!r}): a subclass of shardwise.ParallelStyle is needed, not {found}.")
    taken = STYLES.get(name) or _registered.get(name)
    if taken is not None and taken is not style:
        raise PlanError(f"register_style({name!r}): the name belongs to {taken.__name__}: choose another one.")
    _registered[name] = style


def registered_style(name: str) -> type[ParallelStyle] | None:
    """The style that somebody registered as `name`; None for a built-in one, or none."""
    return _registered.get(name)


def style_named(name: str, where: str) -> type[ParallelStyle]:
    """The style called `name`, which the rule `where` asks for. Raises `PlanError` when there is none."""
    style = STYLES.get(name) or _registered.get(name)
    if style is None:
        known = sorted({*STYLES, *_registered})
        raise PlanError(
            describe(
                f"There is no parallel style {name!r}.",
                rule=where,
                known=_lines(known),
                either=["use one of these, or", f'shardwise.register_style("{name}", YourStyle)'],
            )
        )
    return style


def _lines(names: list[str], width: int = 90) -> list[str]:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > width:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + name
    return lines
