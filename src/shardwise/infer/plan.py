"""A plan for any model, inferred from what it computes, and proven before it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import nn

from shardwise.errors import PlanError, describe
from shardwise.infer.islands import EVERY, Island, find_islands
from shardwise.infer.probe import Probe
from shardwise.infer.products import Product, Trace
from shardwise.infer.proposals import NotPossible, Proposal, propose
from shardwise.infer.prove import Feed, Proof, Reference, check, floats, subject
from shardwise.infer.search import NONE, Patch, patched, patches
from shardwise.plan import Plan, wildcard
from shardwise.resolve import resolve
from shardwise.spec import Rule


Family = tuple[str, str, int]


@dataclass
class Inference:
    """What was found of a model.

    Args:
        plan: the plan, proven.
        proof: what it computes, beside the model.
        left: by family of modules, why it stays whole.
    """

    plan: Plan
    proof: Proof
    left: Mapping[str, str]


def infer_plan(model: nn.Module, tp_size: int, example_inputs: Feed | Sequence[Feed] | None = None) -> Plan:
    """A plan for any model, found from what it computes, and proven on simulated ranks: outputs, and the gradients of all
    parameters. See `shardwise.infer.prove` for the proof.

    Args:
        model: an ordinary model, not changed. Of a transformers model, which may be on meta, another one is made of its
            config, with random weights.
        tp_size: ranks on the tp axis.
        example_inputs: keyword arguments of the model's forward (or a function that calls the model and returns its outputs);
            or several of them. Branches that they don't reach are not looked at. A transformers model that reads texts needs
            none.

    What can't be split, or fails the proof, stays whole: its rows say "replicate", and their rules why.
    Raises `PlanError` where nothing can be split.
    """
    return infer(model, tp_size, example_inputs).plan


def infer(model: nn.Module, tp_size: int, example_inputs: Feed | Sequence[Feed] | None = None) -> Inference:
    """As `infer_plan`, with the proof, and what became of each part."""
    reference = Reference.of(*subject(model, example_inputs))
    left: dict[str, str] = {}
    proposals, ends = _proposals(reference, tp_size, left)
    chosen = _without_conflicts(proposals, left)
    found = _Search(model, reference, tp_size, chosen, ends, left).run()
    if not any(row.sharded for row in found.plan.tensors):
        raise PlanError(
            describe(
                f"{type(model).__name__}: nothing was found that can be split over tp={tp_size}.",
                **({"whole": [f"{name}: {why}" for name, why in left.items()]} if left else {}),
                either=["fewer ranks, or", "a plan of your own: tp_plan={...}"],
            )
        )
    return found


def _proposals(reference: Reference, size: int, left: dict[str, str]) -> tuple[list[Proposal], list[list[Rule]]]:
    model = reference.model
    parameters = dict(model.named_parameters())
    with Trace(parameters) as trace, torch.enable_grad():
        outputs = floats(model, reference.feeds[0])
    probe = Probe(trace.calls, parameters)
    reads = {product: probe.reads(product) for product in probe.consumers}
    elsewhere = probe.reached(outputs)
    for product, found in reads.items():
        if found is None:
            elsewhere |= probe.reached(probe.inputs_of(product))
    islands = list(find_islands([found for found in reads.values() if found is not None]))
    split = {product for island in islands for product in island.consumers}
    for product, found in reads.items():
        if found is not None and product not in split:
            elsewhere |= found.outputs.keys()
    proposals = []
    for island in islands:
        try:
            proposals.append(propose(model, island, size, elsewhere))
        except NotPossible as why:
            for product in island.products:
                left.setdefault(wildcard(product.weight.rpartition(".")[0]), str(why))
    inner = {product for other in probe.consumers for product in probe.reached(probe.inputs_of(other))}
    inner |= {product for proposal in proposals for product in proposal.products}
    last = probe.reached(outputs) - inner
    return proposals, _vocabulary(model, [call.product for call in trace.calls], last, size)


def _without_conflicts(proposals: Sequence[Proposal], left: dict[str, str]) -> list[Proposal]:
    """Each product has one side that is cut: where two are possible, the larger island's."""
    taken: dict[str, Proposal] = {}
    chosen = []
    for proposal in sorted(proposals, key=lambda one: -one.numel):
        other = next((taken[name] for name in proposal.matrices if name in taken), None)
        if other is None:
            taken |= dict.fromkeys(proposal.matrices, proposal)
            chosen.append(proposal)
        else:
            left.setdefault(proposal.family[0], f"products of it are cut as part of {other.place}")
    return chosen


LARGE = 0.02
"""Of the model's elements: an embedding or a head that has more than this share is cut along the vocabulary."""


def _vocabulary(model: nn.Module, products: Sequence[Product], last: set[Product], size: int) -> list[list[Rule]]:
    """Rules, those of one tied parameter together, for large embeddings, and for large linear layers behind which nothing but the model's output comes."""
    total = sum(parameter.numel() for parameter in model.parameters())
    found: dict[str, list[Rule]] = {}
    for product in dict.fromkeys(products):
        parameter = model.get_parameter(product.weight)
        if parameter.numel() <= LARGE * total or parameter.shape[0] < size:
            continue
        if product.inputs is None and product.outputs == 1:
            for name, module in model.named_modules():
                if isinstance(module, nn.Embedding) and module.weight is parameter:
                    rule = Rule(name, "embedding_rowwise", "inferred", reason="rows are looked up one by one")
                    found.setdefault(product.weight, []).append(rule)
        elif product in last and product.outputs == 0:
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and module.weight is parameter:
                    rule = Rule(name, "colwise_gather_output", "inferred", reason="nothing but the output is behind it")
                    found.setdefault(product.weight, []).append(rule)
    return list(found.values())


@dataclass
class _Search:
    """Takes into the plan what the proof lets pass."""

    model: nn.Module
    reference: Reference
    size: int
    proposals: list[Proposal]
    ends: list[list[Rule]]
    left: dict[str, str]
    chosen: dict[Family, Patch] = field(default_factory=dict)

    def run(self) -> Inference:
        families = {proposal.family: [p for p in self.proposals if p.family == proposal.family] for proposal in self.proposals}
        self.chosen = dict.fromkeys(families, NONE)
        plan, proof = self._try(list(families), self.ends)
        if not proof:
            plan, proof = self._one_by_one(families)
        if not proof:
            raise PlanError(
                f"{type(self.model).__name__}: the parts of the plan are right, and together they are not: {proof.problem}"
            )
        return Inference(plan, proof, self.left)

    def _one_by_one(self, families: Mapping[Family, list[Proposal]]) -> tuple[Plan, Proof]:
        kept: list[Family] = []
        for family, proposals in families.items():
            found, problem = self._patch(family, proposals)
            if found is None:
                self.left[family[0]] = problem
            else:
                self.chosen[family] = found
                kept.append(family)
        ends = []
        for rules in self.ends:
            proof = self._try([], [rules])[1]
            if proof:
                ends.append(rules)
            else:
                self.left[rules[0].pattern] = str(proof.problem)
        while True:
            plan, proof = self._try(kept, ends)
            if proof or not (kept or ends):
                return plan, proof
            if kept:
                self.left[kept[-1][0]] = f"together with the others: {proof.problem}"
                kept = kept[:-1]
            else:
                ends = ends[:-1]

    def _patch(self, family: Family, proposals: list[Proposal]) -> tuple[Patch | None, str]:
        first = ""
        for patch in patches(self.reference, proposals[0]):
            self.chosen[family] = patch
            proof = self._try([family], [])[1]
            if proof:
                return patch, ""
            first = first or str(proof.problem)
        return None, first

    def _try(self, families: Sequence[Family], ends: Sequence[list[Rule]]) -> tuple[Plan, Proof]:
        proposals = [proposal for proposal in self.proposals if proposal.family in families]
        rules = [
            *patched(self.reference.model, proposals, self.chosen, self.size),
            *(rule for tied in ends for rule in tied),
            *self._whole(proposals),
        ]
        try:
            return resolve(self.model, rules, self.size), check(self.reference, resolve(self.reference.model, rules, self.size))
        except PlanError as error:
            return Plan(self.size, (), ()), Proof(self.size, float("inf"), float("inf"), "", str(error).splitlines()[0])

    def _whole(self, proposals: Sequence[Proposal]) -> list[Rule]:
        """What stays whole is named in the plan, with the reason."""
        cut = {name for proposal in proposals for name in proposal.matrices}
        found = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and name not in cut:
                why = next((why for place, why in self.left.items() if wildcard(name).startswith(place)), "")
                if why:
                    found.append(Rule(name, "replicate", "inferred", reason=why))
        return found
