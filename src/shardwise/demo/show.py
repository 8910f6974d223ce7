"""The demo on the screen: what it does, how far it is, and what came out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text as RichText

from shardwise.demo.checks import LOSS_CHECK, Check, Measured, Trained
from shardwise.demo.measure import NO_REPEAT
from shardwise.demo.plot import Axis, Curve, draw
from shardwise.demo.settings import Settings
from shardwise.demo.text import Text
from shardwise.demo.train import Training

WHOLE, SHARDED = "cyan", "magenta"
_PLOT_HEIGHT = 11
_LINES_WITHOUT_TERMINAL = 8


class Screen:
    """What rank 0 writes to standard output. In a terminal the progress is live; elsewhere it is a line now and then.

    Args:
        settings: what runs.
        console: where to; standard output by default.
    """

    def __init__(self, settings: Settings, console: Console | None = None) -> None:
        self.settings = settings
        self.console = console or Console(highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def opening(self, text: Text, parameters: int) -> None:
        """Say what is going to happen."""
        size, tp = self.settings.size, self.settings.tp
        ranks, one = f"[{SHARDED}]{tp} tensor-parallel ranks[/]", f"[{WHOLE}]one process[/]"
        self.console.print(f"[bold]shardwise demo[/]  the same training on {ranks} and in {one}")
        facts = Table.grid(padding=(0, 2))
        facts.add_row(
            "model", f"Llama, {parameters / 1e6:.1f} M parameters, {size.layers} layers of width {size.hidden}, float32"
        )
        facts.add_row(
            "text", f"{escape(text.name)}, {(len(text.training) + len(text.held_out)) / 1e6:.1f} MB, each byte a token"
        )
        facts.add_row("steps", f"{self.settings.total_steps} of AdamW, {size.batch} x {size.length} tokens in each")
        self.console.print(facts)

    def stage(self, words: str) -> None:
        """Something new begins."""
        self._replace_task(self._progress.add_task(words, total=None, now=""))

    def step(self, training: Training) -> None:
        """A step of both runs is done."""
        whole, sharded = training.whole, training.sharded
        assert whole is not None
        done, total = len(sharded.losses), self.settings.total_steps
        tokens = self.settings.size.batch * self.settings.size.length
        now = (
            f"loss [{WHOLE}]{whole.losses[-1]:.4f}[/] [{SHARDED}]{sharded.losses[-1]:.4f}[/]  "
            f"tokens/s [{WHOLE}]{tokens / whole.seconds[-1]:.0f}[/] [{SHARDED}]{tokens / sharded.seconds[-1]:.0f}[/]"
        )
        if done == 1:
            self._replace_task(self._progress.add_task("training", total=total, now=now))
        if self._task is not None:
            self._progress.update(self._task, completed=done, now=now)
        if not self.console.is_terminal and (done == 1 or done % math.ceil(total / _LINES_WITHOUT_TERMINAL) == 0):
            self.console.print(f"step {done:>4}  {now}")

    def result(self, found: Measured, checks: Sequence[Check], seconds: float) -> None:
        """Everything that came out, and the verdict."""
        self._progress.stop()
        bound = next(check.bound for check in checks if check.name == LOSS_CHECK)
        self.console.print(curves(found.trained, bound, self.console.width), "", check_table(checks), "", resources(found))
        self.console.print(continuation(found))
        self.console.print(f"Written to {escape(str(self.settings.output))}: loss.png, report.json, checkpoint/")
        failed = [check for check in checks if not check.passed]
        verdict = (
            f"[bold red]{len(failed)} of {len(checks)} checks failed[/]"
            if failed
            else f"[bold green]All {len(checks)} checks hold[/]"
        )
        self.console.print(f"{verdict}, {seconds:.0f} s.")
        for check in failed:
            self.console.print(f"  [red]✗[/] {check.name}: {number(check.measured)}, at most {number(check.bound)}")
            self.console.print(f"    [dim]expected: {check.reason}[/]")

    def _replace_task(self, task: TaskID) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = task


def curves(found: Trained, bound: float, width: int) -> Table:
    """The loss of both runs, and beside it how far they are apart, with the `bound` on that, on a logarithmic axis."""
    each = min(width, 110) // 2 - 1
    losses = [*found.whole.losses, *found.sharded.losses]
    apart = [math.log10(max(abs(a - b), 1e-8)) for a, b in zip(found.sharded.losses, found.whole.losses, strict=True)]
    loss = draw(
        [Curve(found.whole.losses, WHOLE), Curve(found.sharded.losses, SHARDED, "marks")],
        Axis(min(losses), max(losses), lambda value: f"{value:.1f}"),
        "loss: ── one process  ● sharded",
        each,
        _PLOT_HEIGHT,
    )
    difference = draw(
        [Curve([math.log10(bound)] * len(apart), "red"), Curve(apart, "yellow", "points")],
        Axis(-8, 0, lambda value: f"1e{value:+.0f}"),
        f"their difference, at most {bound:g}",
        each,
        _PLOT_HEIGHT,
    )
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row(loss, difference)
    return grid


def check_table(checks: Sequence[Check]) -> Table:
    """One line a check: what, the number, the bound, whether it holds."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("at most", justify="right")
    table.add_column("")
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            table.add_row(f"[bold]{group}[/]")
        mark = "[green]✓[/]" if check.passed else "[bold red]✗[/]"
        table.add_row(f"  {check.name}", number(check.measured), number(check.bound), mark)
    return table


def resources(found: Measured) -> Table:
    """Speed and memory, side by side."""
    trained, loaded = found.trained, found.loaded
    whole, sharded = (curve.tokens_per_second(trained.tokens) for curve in (trained.whole, trained.sharded))
    largest = max(loaded.rank_bytes)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (
        ("", "left"),
        ("one process", "right"),
        (f"{len(loaded.rank_bytes)} ranks", "right"),
        ("ratio", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_row("training, tokens per second", f"{whole:,.0f}", f"{sharded:,.0f}", f"{sharded / whole:.2f}")
    table.add_row(
        "parameters on a rank, MiB",
        f"{loaded.whole_bytes / 2**20:.2f}",
        f"{largest / 2**20:.2f}",
        f"{largest / loaded.whole_bytes:.3f}",
    )
    return table


def continuation(found: Measured) -> Panel:
    """The prompt and what the model made of it, control characters shown as such."""
    given, made = (
        "".join(c if c.isprintable() or c == "\n" else "·" for c in text)
        for text in (found.generated.prompt, found.generated.text)
    )
    text = Group(RichText.assemble((given, "dim"), (made, "bold")))
    return Panel(
        text,
        title=f"prompt, and its greedy continuation on every rank (no {NO_REPEAT} bytes twice)",
        title_align="left",
        border_style="dim",
    )


def number(value: float) -> str:
    """A number of a check, as short as it can be."""
    if not math.isfinite(value) or value == 0 or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:g}"
    return f"{value:.3f}" if 0.1 <= abs(value) < 1000 else f"{value:.1e}"
