"""Several sizes of the tp axis side by side, and why some can't be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from transformers import PreTrainedConfig

from shardwise.errors import PlanError, SimulationError
from shardwise.estimate.result import Estimate
from shardwise.estimate.run import estimate
from shardwise.plan import Plan
from shardwise.plan.notes import notes
from shardwise.planning import PlanLike, make_plan
from shardwise.report import Page, Section, as_text

_LEGEND = "MiB on a rank; share: parameters, in parts of 1/tp; a step's collectives, and what a rank puts in."
_TRAINING = ("tp", "parameters", "gradients", "optimizer", "activations", "peak", "share", "collectives", "put in")
_PREFILL = ("tp", "parameters", "KV cache", "activations", "peak", "share", "collectives", "put in")


@dataclass(frozen=True)
class Comparison:
    """What a step takes at several sizes of the tp axis. `print` shows it, `to_html` gives a page.

    Attributes:
        found: by size: the estimate; the table alone, where the step can't be simulated; or why there is no plan.
        unsimulated: why the step could not be simulated; "" where it could.
    """

    found: Mapping[int, Estimate | Plan | PlanError]
    unsimulated: str = ""

    @property
    def possible(self) -> tuple[int, ...]:
        """The sizes for which there is a plan."""
        return tuple(size for size, one in self.found.items() if not isinstance(one, PlanError))

    def text(self) -> list[RenderableType]:
        """A row for each size, then what keeps the others from being."""
        grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for heading in self._headings:
            grid.add_column(heading, justify="right", overflow="fold")
        for row in self._rows():
            grid.add_row(*row)
        said = [f"note  tp={size}: {note}" for size, note in self._notes()]
        refused = [f"tp={size} cannot be: {reason}" for size, reason in self._refused()]
        unknown = [self.unsimulated] if self.unsimulated else []
        below: list[RenderableType] = [*refused, *unknown, *said]
        return [f"[bold]{self._title}[/]", _LEGEND, "", grid, *([""] if below else []), *below]

    def __str__(self) -> str:
        return as_text(*self.text())

    def to_html(self) -> str:
        """A page that stands alone."""
        sections = [Section("Sizes", text=_LEGEND, headings=self._headings, rows=self._rows())]
        if refused := self._refused():
            sections.append(Section("Sizes that cannot be", headings=("tp", "why"), rows=[[str(n), why] for n, why in refused]))
        if self.unsimulated:
            sections.append(Section("Not simulated", text=self.unsimulated))
        if said := self._notes():
            sections.append(Section("Left whole", text="\n".join(f"tp={size}: {note}" for size, note in said)))
        return Page(title=self._title, sections=sections).to_html()

    @property
    def _estimates(self) -> list[Estimate]:
        return [one for one in self.found.values() if isinstance(one, Estimate)]

    @property
    def _title(self) -> str:
        sizes = ", ".join(map(str, self.found))
        first = next(iter(self._estimates), None)
        return f"{first.model}, {first.step}: tp={sizes}" if first else f"tp={sizes}"

    @property
    def _headings(self) -> Sequence[str]:
        first = next(iter(self._estimates), None)
        return _PREFILL if first is not None and not first.step.training else _TRAINING

    def _rows(self) -> list[list[str]]:
        rows: list[list[str]] = []
        for size, one in self.found.items():
            if isinstance(one, Estimate):
                state = [one.gradients, one.optimizer] if one.step.training else [one.cache]
                memory = [_mib(value) for value in (one.parameters, *state, one.activations, one.peak)]
                rows.append([str(size), *memory, f"{one.plan.share:.3f}", f"{len(one.collectives):,}", _mib(one.put_in)])
            elif isinstance(one, Plan):
                empty = ["-"] * (len(self._headings) - 3)
                rows.append([str(size), _mib(one.fullest_bytes), *empty[:-2], f"{one.share:.3f}", *empty[-2:]])
            else:
                rows.append([str(size), *["-"] * (len(self._headings) - 1)])
        return rows

    def _refused(self) -> list[tuple[int, str]]:
        return [(size, str(one).splitlines()[0]) for size, one in self.found.items() if isinstance(one, PlanError)]

    def _notes(self) -> list[tuple[int, str]]:
        plans = {size: one.plan if isinstance(one, Estimate) else one for size, one in self.found.items()}
        return [(size, note) for size, one in plans.items() if isinstance(one, Plan) for note in notes(one)]


def compare(config: PreTrainedConfig, sizes: Sequence[int], plan: PlanLike = "auto", **options: Any) -> Comparison:
    """`estimate` at each of `sizes`, with the same options; a size that can't be is kept with the reason.

    Raises as `estimate` for everything else.
    """
    found: dict[int, Estimate | Plan | PlanError] = {}
    reason = ""
    for size in sizes:
        try:
            found[size] = estimate(config, size, plan, **options)
        except PlanError as error:
            found[size] = error
        except SimulationError as error:
            reason = str(error)
            found[size] = make_plan(config, size, plan, ep_size=options.get("ep_size"))
    return Comparison(found, reason)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
