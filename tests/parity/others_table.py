"""The results of the other classes, as the third table of `docs/architectures.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from parity.others import OTHERS
from parity.table import Result
from shardwise.infer.unknown import cut_share

TITLE = "Other classes"
COLUMNS = ("type", "exact on 2 ranks", "outputs", "gradients", "cut")
_HEAD = """\
Encoders, encoder-decoders, towers alone and decoders with other heads, loaded through the Auto classes of these tasks
(*MaskedLM* stands for `AutoModelForMaskedLM`, *model* for `AutoModel`) with `tp_plan="auto"`, on 2 ranks beside one process.
*exact* means what it means above, of everything that the model returns; a model without a loss has random weights for its
outputs as one. What generates does so greedily and with two beams. Of the tasks of a type the columns have the largest error
and the smallest share of elements that are cut.

"""


def rows_of(results: Mapping[str, Result]) -> list[tuple[str, ...]]:
    """The row of each type that there are results of, by type and task."""
    kinds = dict.fromkeys(name.partition(" ")[0] for name in results)
    return [_row(kind, [(task, results[f"{kind} {task}".strip()]) for task in OTHERS[kind].tasks]) for kind in kinds]


def _row(kind: str, results: Iterable[tuple[str, Result]]) -> tuple[str, ...]:
    found = dict(results)
    words = [task or "model" for task, result in found.items() if result.exact]
    words += [f"**wrong**: {task or 'model'}" for task, result in found.items() if not result.exact]
    outcomes = [result.outcome for result in found.values() if result.outcome is not None]
    if not outcomes:
        return (kind, ", ".join(words), "-", "-", "-")
    logits, gradients = (max(getattr(one, name) for one in outcomes) for name in ("logits", "gradients"))
    cut = min(cut_share(outcome.plan) for outcome in outcomes)
    return (kind, ", ".join(words), f"{logits:.0e}", f"{gradients:.0e}", f"{100 * cut:.0f} %")


def render_others(results: Mapping[str, Result]) -> str:
    """What follows the other tables."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *rows_of(results)]
    return f"\n## {TITLE}\n\n{_HEAD}" + "".join(f"| {' | '.join(row)} |\n" for row in rows)
