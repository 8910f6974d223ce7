"""Whether a plan is right, for whoever has one; and of a wrong one, which part of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from shardwise.errors import PlanError, describe, first_of
from shardwise.hf import Feed, small_chunks
from shardwise.infer.parts import Part, only, parts_of
from shardwise.infer.proof import Island, Proof
from shardwise.infer.simulate import Reference, check
from shardwise.infer.subject import subject
from shardwise.infer.surroundings import plain_surroundings
from shardwise.layers import STYLES
from shardwise.names import layer_of
from shardwise.plan import Plan
from shardwise.spec import Rule
from shardwise.testing import within_threads

MOST_RANKS = 16
"""Ranks up to which a user's rules are tried out unasked: each is a thread of every process."""
_SHOWN = 8


@plain_surroundings()
def prove(plan: Plan, model: nn.Module, example_inputs: Feed | Sequence[Feed] | None = None) -> Proof:
    """Show that `plan` computes what `model` does: outputs, and the gradients of all parameters.

    Every rank is simulated in this process, with the very layers and collectives that would run, on the inputs given; weights
    are the model's with some noise, as zeros and ones hide errors. Needs room for `plan.size` + 2 copies of the model.

    Args:
        plan: for any number of ranks.
        model: the ordinary model, not changed. Of a transformers model, which may be on meta, another one is made of its
            config.
        example_inputs: keyword arguments of its forward; or several of them, which are accumulated. A transformers model that
            reads texts needs none.

    Raises `PlanError` for a plan that is wrong, with the module, the parameter and the figure.
    """
    proof = examine(plan, model, example_inputs)
    if proof.problem is not None:
        raise PlanError(describe(f"The plan is wrong: {proof.problem}.", **facts(proof)))
    return proof


def examine(plan: Plan, model: nn.Module, example_inputs: Feed | Sequence[Feed] | None = None) -> Proof:
    """As `prove`, with what was found of each part of the plan, and also of a wrong one.

    Raises `PlanError` where nothing can be tried: for lack of inputs, or where experts are dealt to more ranks.
    """
    if plan.ep_size != plan.size:
        raise PlanError(f"The plan deals experts to {plan.ep_size} ranks, which is not simulated: prove one without ep_size.")
    with small_chunks(model):
        tried = subject(model, example_inputs, _cuts(plan))
        reference, table = Reference.of(tried), _of_the_same(plan, model, tried.model)
        proof = check(reference, table)
        return replace(proof, tried=tried.words, islands=tuple(_islands(plan, reference, table, proof)))


def facts(proof: Proof) -> dict[str, str | list[str]]:
    """What is known of a wrong plan besides its problem, and the ways out, for `describe`."""
    wrong = [island for island in proof.islands if island.problem is not None]
    yours = list(dict.fromkeys(rule for island in wrong for rule in island.yours))
    ways = [f"leave out your rule {rule}, or" for rule in yours] or ['another plan, such as tp_plan="infer", or']
    found: dict[str, str | list[str]] = {"ranks": str(proof.size)}
    if wrong:
        found |= {"wrong": [f"{island.name} ({island.styles})" for island in wrong]}
        right = [island.name for island in proof.islands if island.problem is None]
        found |= {"right": right} if right else {}
    return found | {"either": [*ways, "replicate for what is named"]}


def _islands(plan: Plan, reference: Reference, table: Plan, proof: Proof) -> Iterator[Island]:
    """What was found of each part of `plan`, of which `table` has the rows that were tried."""
    parts = parts_of(plan)
    for part, own in zip(parts, _apart(reference, table, parts, proof), strict=True):
        errors = [(error, name) for name, error in own.errors.items() if name in part]
        gradients, worst = max(errors, default=(own.gradients if own.problem else 0.0, own.worst))
        yours = tuple(f"{rule.pattern}: {rule.style}" for rule in part.rules if rule.source == "user")
        yield Island(part.name, part.count, part.styles, yours, gradients, worst, own.problem)


def _apart(reference: Reference, plan: Plan, parts: Sequence[Part], proof: Proof) -> list[Proof]:
    """The proof of each part: of a right plan, the plan's. Of a wrong one that part is tried first to be computed whole where
    the first error is; if it is not all that is wrong, each part is tried alone.
    """
    if proof:
        return [proof] * len(parts)
    guessed = [part for part in parts if proof.place and proof.place in part]
    if guessed:
        others = check(reference, only(plan, [part for part in parts if part not in guessed]))
        if others:
            return [proof if part in guessed else others for part in parts]
    return [check(reference, only(plan, [part])) for part in parts]


def prove_rules(plan: Plan, model: nn.Module, edited: bool = False) -> None:
    """Show that the rules of a plan which its user wrote go together with the rest, before a weight is read. `edited` says
    that the user may have written them all.

    Raises `PlanError` where they don't, as `prove` does. What can't be shown, says `try_out`, is taken as it is.
    """
    written = {str(rule): rule for rule in _rules(plan) if edited or rule.source == "user"}
    proof = try_out(plan, model) if written else None
    if proof is not None and proof.problem is not None:
        raise PlanError(
            describe(
                f"The plan is wrong: {proof.problem}.",
                ranks=str(plan.size),
                rules=first_of(list(written), _SHOWN),
                found="on random weights, before any of the model's was read",
                either=[
                    "change these rules: a layer's neighbours have to be cut as it is, or all of them replicate, or",
                    "tp_plan=shardwise.plan(config, tp_size, {...}), which is taken as it is",
                ],
            )
        )


@plain_surroundings()
def try_out(plan: Plan, model: nn.Module) -> Proof | None:
    """The proof of a `plan` that its user has not asked for; None where there can be none: of plans with styles that the user
    registered, or that deal experts to several replicas; for more than `MOST_RANKS` ranks; for a model that no config of
    transformers makes, or whose inputs aren't known here; on ranks that are threads already; or where it takes too long.
    """
    ours = all(rule.style in STYLES for rule in _rules(plan))
    if not ours or plan.size > MOST_RANKS or plan.ep_size != plan.size or within_threads():
        return None
    with small_chunks(model):
        try:
            tried = subject(model, None, _cuts(plan))
            reference = Reference.of(tried)
        except Exception:  # whatever a model's own code may raise on inputs that are not for it
            return None
        proof = check(reference, _of_the_same(plan, model, tried.model))
    return None if proof.late else proof


def _rules(plan: Plan) -> list[Rule]:
    rules = (*(row.rule for row in plan.tensors), *(row.rule for row in plan.modules))
    return [rule for rule in rules if rule is not None]


def _cuts(plan: Plan) -> dict[str, Hashable]:
    """What `plan` does in each layer, by its path: layers in which it differs are all tried."""
    found: dict[str, list[Hashable]] = {}
    for tensor in plan:
        layer = layer_of(tensor.name)
        found.setdefault(layer, []).append((tensor.name.removeprefix(layer), tensor.layout, tensor.partial))
    for module in plan.modules:
        layer = layer_of(module.name)
        numbers = (*module.attributes.items(), *module.options.items())
        found.setdefault(layer, []).append((module.name.removeprefix(layer), module.style, numbers, module.region))
    return {layer: tuple(rows) for layer, rows in found.items()}


def _of_the_same(plan: Plan, model: nn.Module, tried: nn.Module) -> Plan:
    """The rows of `plan`, which is for `model`, that are for what is `tried` of it."""
    layers = {layer_of(name) for name, _ in tried.named_modules()}
    if not {layer_of(name) for name, _ in model.named_modules()} > layers:
        return plan
    tensors = tuple(row for row in plan.tensors if layer_of(row.name) in layers)
    return replace(plan, tensors=tensors, modules=tuple(row for row in plan.modules if layer_of(row.name) in layers))
