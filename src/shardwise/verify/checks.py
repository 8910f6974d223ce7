"""What every rank does: load, train some micro-batches, generate, save; and the checks of what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.model_state import required_state
from shardwise.verify.attempt import Raised, attempt
from shardwise.verify.compare import (
    Measure,
    Tensors,
    comparison,
    differing_replicas,
    held_in_common,
    saved_differences,
    token_differences,
    worst,
)
from shardwise.verify.load import Feed, checkpoint, feeds, load_sharded
from shardwise.verify.measure import Found, Generated, generate, save, step, why_not_generate
from shardwise.verify.one import generated_by_one, numbers_of, saved_by_one
from shardwise.verify.result import Check
from shardwise.verify.settings import Settings


@dataclass
class Findings:
    """What the first rank found; on the others, as much of it as they know.

    Attributes:
        outputs, losses, gradients: a number for each micro-batch.
        replicas: what differs between ranks.
        tokens: rows that differ, and rows that differ by a tie.
        saved: keys that differ.
        raised: where it ended, if it did.
        common: pieces that ranks hold in common.
        accumulation: a parameter whose gradient is wrong only when it accumulates, and it, the ranks' and the right one, after
            each micro-batch.
        earlier: the ranks' and the right gradients after the last micro-batch, while all are right.
        skipped: why a check does not apply, by its name.
    """

    outputs: list[Measure] = field(default_factory=list)
    losses: list[Measure] = field(default_factory=list)
    gradients: list[Measure] = field(default_factory=list)
    replicas: list[str] = field(default_factory=list)
    tokens: tuple[int, int] | None = None
    saved: list[str] | None = None
    raised: Raised | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    common: int = 0
    earlier: tuple[Tensors, Tensors] | None = None
    accumulation: tuple[str, list[Tensor], list[Tensor]] | None = None


def measure_ranks(settings: Settings) -> Findings:
    """Run the whole course on this rank. Collective. What is compared is compared on the first rank."""
    found = Findings()
    model = load_sharded(settings, checkpoint(settings), settings.torch_dtype)
    given = feeds(settings, model)
    called = torch.compile(model) if settings.compiled else model
    _compare_common(found, model, "weight of ", lambda p: p.detach())
    for number, feed in enumerate(given):
        problem = attempt("training", partial(_train, settings, found, model, called, feed, number))
        if isinstance(problem, Raised):
            found.raised = problem
            return found
    model.zero_grad()
    _generate(settings, found, model, given[0])
    if found.raised is None:
        problem = attempt("saving", lambda: save(model, saved_by_ranks(settings)))
        found.raised = problem if isinstance(problem, Raised) else None
        if found.raised is None and dist.get_rank() == 0:
            found.saved = saved_differences(saved_by_ranks(settings), saved_by_one(settings))
    return found


def make_checks(settings: Settings, found: Findings) -> list[Check]:
    """The checks on what was found."""
    compare = comparison(settings.torch_dtype)
    reason = _REASONS[type(compare).__name__]
    checks = [
        _check("logits", found.outputs, compare.unit, reason),
        _check("loss", found.losses, compare.unit, reason),
    ]
    for number in range(max(len(found.gradients), 1)):
        batches = f"{number + 1} micro-batch{'es' if number else ''}"
        checks.append(_check(f"gradients, {batches}", found.gradients[number : number + 1], compare.unit, reason))
    count = len(found.replicas)
    checks.append(
        Check(
            "replicas that differ",
            float(count),
            0,
            f"of {found.common}",
            "what ranks hold in common is the same bit by bit",
            found.replicas[0] if count else "",
        )
    )
    return [*checks, _tokens_check(found), _saved_check(found)]


def _train(settings: Settings, found: Findings, model: Any, called: Any, feed: Feed, number: int) -> None:
    ours = step(model, called, feed)
    _compare_common(found, model, "gradient of ", lambda p: p.grad)
    everyone: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (ours.outputs, ours.loss))
    if dist.get_rank() > 0:
        return
    compare = comparison(settings.torch_dtype)
    one = numbers_of(settings, "one", number)
    exact = numbers_of(settings, "exact", number) if compare.unit else None
    ranks = [type(ours)(outputs, loss, None) for outputs, loss in everyone]  # type: ignore[misc]
    found.outputs.append(worst([compare.outputs(rank, one, exact) for rank in ranks]))
    found.losses.append(worst([compare.loss(rank, one, exact) for rank in ranks]))
    assert ours.gradients is not None
    assert one.gradients is not None
    found.gradients.append(compare.gradients(ours.gradients, one.gradients, exact.gradients if exact else None))
    _keep_accumulation(found, ours, one)


def _keep_accumulation(found: Findings, ours: Found, one: Found) -> None:
    """Of the parameter that is wrong first, what is needed to tell why it is so only when it accumulates."""
    assert ours.gradients is not None
    assert one.gradients is not None
    *before, last = found.gradients
    if last.value <= last.bound or not all(m.value <= m.bound for m in before):
        found.earlier = (ours.gradients, one.gradients)
        return
    name = last.place
    if found.earlier is not None and all(name in each for each in (*found.earlier, ours.gradients, one.gradients)):
        mine, right = found.earlier
        found.accumulation = (name, [mine[name], ours.gradients[name]], [right[name], one.gradients[name].clone()])
    found.earlier = None


def _generate(settings: Settings, found: Findings, model: Any, prompt: Feed) -> None:
    if why := why_not_generate(model):
        found.skipped["tokens"] = why
        return
    made = attempt("generate", lambda: generate(model, prompt, settings.new_tokens))
    if isinstance(made, Raised):
        found.raised = made
        return
    everyone: list[Generated | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, made)
    if dist.get_rank() == 0:
        one, noise = generated_by_one(settings), _NOISE[settings.dtype]
        differences = [token_differences(rank, one, noise) for rank in everyone if rank is not None]
        found.tokens = max(differences)


def _compare_common(found: Findings, model: nn.Module, what: str, read: Callable[[nn.Parameter], Tensor | None]) -> None:
    mesh = required_state(model).ep
    mine = held_in_common(model, read)
    everyone: list[dict[str, str]] = [{}] * mesh.size()
    dist.all_gather_object(everyone, mine, group=mesh.get_group())
    found.common = max(found.common, len(mine))
    found.replicas += [what + name for name in differing_replicas(everyone) if what + name not in found.replicas]


def _check(name: str, measures: Sequence[Measure], unit: str, reason: str) -> Check:
    if not measures:
        return _not_reached(name)
    measure = worst(measures)
    return Check(name, measure.value, measure.bound, unit, reason, measure.place)


def _not_reached(name: str) -> Check:
    return Check(name, None, 0, "", "not reached", reached=False)


def _tokens_check(found: Findings) -> Check:
    name = "generated rows that differ"
    if why := found.skipped.get("tokens"):
        return Check(name, None, 0, "", why)
    if found.tokens is None:
        return _not_reached(name)
    differ, ties = found.tokens
    reason = "noise does not change the likeliest token"
    if ties:
        reason += f"; {ties} more differ behind two tokens that are equally likely but for noise"
    return Check(name, float(differ), 0, "", reason)


def _saved_check(found: Findings) -> Check:
    name, keys = "saved tensors that differ", found.saved
    if keys is None:
        return _not_reached(name)
    return Check(name, float(len(keys)), 0, "", "save_pretrained writes the bytes that one process writes", ", ".join(keys[:3]))


def saved_by_ranks(settings: Settings) -> Path:
    """Where the ranks save."""
    return Path(settings.folder) / "saved by ranks"


_NOISE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2}
_REASONS = {
    "Exact": "the same sums in another order: a lost or doubled term is 1e-2 at least",
    "Rounded": "more roundings, one for each part of a sum; a lost or doubled term is tens of them",
}
