"""From what the ranks found to the verdict: the checks, and where one does not hold, the culprit."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.hf import build_on_meta
from shardwise.infer import Proof
from shardwise.plan import Plan
from shardwise.planning import make_plan
from shardwise.spec import ModuleSpec, ShardSpec
from shardwise.verify.arrange import Same
from shardwise.verify.checks import Findings, make_checks, measure_ranks, saved_by_ranks
from shardwise.verify.compare import saved_tensor
from shardwise.verify.diagnose import hypotheses, ranked, tried
from shardwise.verify.locate import BACKWARD, Difference, apart
from shardwise.verify.one import saved_by_one
from shardwise.verify.proven import it_is_the_plan, what_is_left
from shardwise.verify.record import Key
from shardwise.verify.result import Culprit, Hypothesis, Verification
from shardwise.verify.search import find_culprit, rule_of
from shardwise.verify.settings import Settings


def before_ranks(settings: Settings, plan: Plan, proof: Proof | str) -> Verification:
    """What is known before ranks start: no checks, the proof of the plan, or why there is none."""
    notes = () if isinstance(proof, Proof) else (f"The plan is not proven in one process: {proof}",)
    return Verification(
        title=_title(settings),
        facts=tuple(_facts(settings, plan)),
        checks=(),
        notes=notes,
        proof=replace(proof, errors={}) if isinstance(proof, Proof) else None,
    )


def with_proof(settings: Settings, result: Verification, known: Verification) -> Verification:
    """What the ranks found, with what was known before they started, and what that says of the culprit."""
    proof, blame = known.proof, ""
    if proof is not None and not proof:
        blame = it_is_the_plan(proof)
    elif proof is not None and not result.passed:
        blame = what_is_left(proof, result.culprit.module if result.culprit else "", settings)
    seconds = result.seconds + known.seconds
    return replace(result, proof=proof, blame=blame, notes=(*known.notes, *result.notes), seconds=seconds)


def verify_on_ranks(settings: Settings) -> Verification | None:
    """The whole verification on this rank; the result is on the first one. Collective."""
    found = measure_ranks(settings)
    number = [_micro_batch_to_search(found)]
    dist.broadcast_object_list(number, 0)
    culprit = find_culprit(settings, number[0]) if number[0] is not None else None
    if dist.get_rank() > 0:
        return None
    if culprit is None and found.accumulation is not None:
        culprit = _accumulation(found, settings)
    if culprit is None and number[0] is None and found.saved:
        culprit = _saved(settings, found.saved)
    return Verification(
        title=_title(settings),
        facts=tuple(_facts(settings, _plan(settings))),
        checks=tuple(make_checks(settings, found)),
        culprit=culprit,
        notes=tuple(_notes(settings, found, culprit, number[0])),
    )


def _micro_batch_to_search(found: Findings) -> int | None:
    """The first micro-batch in which training went wrong; None where it did in none."""
    for number, measures in enumerate(zip(found.outputs, found.losses, found.gradients, strict=False)):
        if not all(measure.value <= measure.bound for measure in measures):
            return number
    if found.raised is not None and found.raised.phase == "training":
        return len(found.gradients)
    return 0 if any(name.startswith("gradient") for name in found.replicas) else None


def _title(settings: Settings) -> str:
    return f"{settings.model} on {settings.world} ranks beside one process"


def _facts(settings: Settings, plan: Plan) -> list[tuple[str, str]]:
    subject = settings.subject()
    random = ", random weights" if subject.path is None else ""
    layers = f", {settings.layers} layers" if settings.layers is not None else ""
    experts = f", experts dealt to {settings.ep}" if settings.ep is not None else ""
    extra = [word for word, on in (("compiled", settings.compiled), ("sequence-parallel", settings.sequence_parallel)) if on]
    inputs = (
        "yours"
        if settings.inputs
        else f"{settings.micro_batches} micro-batches of {settings.batch} x {settings.sequence} random ids, one padded"
    )
    return [
        ("model", f"{subject.config.model_type}{layers}{random}, {settings.dtype}"),
        ("ranks", ", ".join([f"tp={settings.tp}{experts}", *extra])),
        ("plan", _whose(plan)),
        ("inputs", f"{inputs}; dropout off"),
    ]


def _notes(settings: Settings, found: Findings, culprit: Culprit | None, number: int | None) -> list[str]:
    notes = []
    if found.raised is not None:
        notes.append(f"All ranks raised in {found.raised.phase}: {found.raised.message}")
    if number is not None and culprit is None:
        eager = "In eager code and float32, with every module looked at, nothing differs: "
        where = "it is in the compiled code" if settings.compiled else f"it is in {settings.dtype}, or in what modules share"
        notes.append(eager + where + ".")
    if number is None and found.tokens is not None and found.tokens[0]:
        notes.append("Training is right, so it is in what only generate does: the cache, or one position at a time.")
    if found.outputs and culprit is not None and "expert" in culprit.module:
        notes.append("A router whose experts are equally likely but for noise may choose another one: try --dtype float64.")
    return notes


def _accumulation(found: Findings, settings: Settings) -> Culprit:
    """A gradient that is right after the first micro-batch, and wrong after later ones."""
    assert found.accumulation is not None
    name, ours, right = found.accumulation
    size = settings.world
    number = len(ours) - 1
    floor = 1e-3 * float(right[-1].abs().max())
    difference = Difference(
        Key("gradient of parameter", name),
        (ours[-1],),
        right[-1],
        Same(),
        apart(ours[-1], right[-1], floor),
        BACKWARD,
        floor,
    )
    again = ours[-1] - (size - 1) * ours[-2]
    made = [
        tried(
            difference,
            "a sum over the accumulated gradient",
            f"what was there before micro-batch {number + 1} is counted {size} times: .grad is summed, not what is added to it",
            [again],
        ),
        *hypotheses(difference, size),
    ]
    module, _, parameter = name.rpartition(".")
    return Culprit(
        module=module,
        what=f"the gradient of its {parameter}, accumulated over {number + 1} micro-batches",
        phase="backward",
        style=rule_of(_plan(settings), module),
        error=difference.error,
        bound=BACKWARD,
        shape=tuple(right[-1].shape),
        hypotheses=tuple(ranked(made)),
        note=f"After {number} it was right.",
    )


def _saved(settings: Settings, keys: list[str]) -> Culprit:
    """A tensor that is saved otherwise, though everything that was computed is right."""
    name = keys[0]
    ours, right = (saved_tensor(folder, name) for folder in (saved_by_ranks(settings), saved_by_one(settings)))
    made: list[Hypothesis] = []
    error = None
    if ours is not None and right is not None:
        difference = _of_saved(name, ours, right)
        made, error = hypotheses(difference, settings.tp), difference.error
    missing = "is not written" if ours is None else "is written, and should not be" if right is None else "is written otherwise"
    return Culprit(
        module=name.rpartition(".")[0],
        what=f"{name} {missing}",
        phase="save",
        style=rule_of(_plan(settings), name.rpartition(".")[0]),
        error=error,
        bound=0.0,
        shape=tuple(right.shape) if right is not None else (),
        hypotheses=tuple(made),
        note=f"{len(keys)} keys differ: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}.",
    )


def _whose(plan: Plan) -> str:
    """Who wrote the rules, and how many of them hold."""
    rows: list[ModuleSpec | ShardSpec] = [*plan.tensors, *plan.modules]
    sources = [rule.source for rule in {id(row.rule): row.rule for row in rows if row.rule is not None}.values()]
    named = {
        "model": "the model's own",
        "shardwise": "shardwise's corrections",
        "inferred": "inferred from what the model computes",
        "frozen": "frozen: inferred and proven for this type",
        "user": "yours",
    }
    return ", ".join(f"{words}: {sources.count(source)}" for source, words in named.items() if source in sources)


def _plan(settings: Settings) -> Plan:
    return make_plan(build_on_meta(settings.subject().config), settings.tp, settings.plan, ep_size=settings.ep)


def _of_saved(name: str, ours: Tensor, right: Tensor) -> Difference:
    ours, right = ours.to(torch.float64), right.to(torch.float64)
    return Difference(Key("gradient of parameter", name), (ours,), right, Same(), apart(ours, right, 0.0), 0.0, 0.0)
