"""Takes into the plan what the proof lets pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

from torch import nn

from shardwise.errors import PlanError
from shardwise.infer.ends import gathered
from shardwise.infer.lift import lifted
from shardwise.infer.named import Named
from shardwise.infer.proof import Proof
from shardwise.infer.proposals import Proposal
from shardwise.infer.search import NONE, Patch, patched, patches
from shardwise.infer.simulate import Reference, check
from shardwise.infer.switched import exchanged, switched
from shardwise.infer.twins import Twins, find_twins, with_twins
from shardwise.plan import Plan, wildcard
from shardwise.plans.torch_modules import encoders
from shardwise.resolve import resolve
from shardwise.spec import Rule

Family = tuple[str, str, int]
FEW = 8
"""How many patches are tried of families together, and of what is written in another way than the first."""


@dataclass(frozen=True)
class Inference:
    """What was found of a model.

    Args:
        plan: the plan, proven.
        proof: what it computes, beside the model.
        left: why what stays whole does, by the name of the module or parameter, with `*` for numbers.
    """

    plan: Plan
    proof: Proof
    left: Mapping[str, str]


@dataclass
class Choice:
    """The search for a plan that passes: everything at once, or else family by family, each with what its modules need besides.

    Args:
        model: for which the plan is.
        reference: what it is tried out on.
        size: ranks.
        proposals: rules for the islands of the model.
        ends: rules for its vocabulary, those of one tied parameter together.
        left: why what stays whole does, by name; what fails here is added.
        named: rules that hold whatever is found.
    """

    model: nn.Module
    reference: Reference
    size: int
    proposals: list[Proposal]
    ends: list[list[Rule]]
    left: dict[str, str]
    named: Named = field(default_factory=Named)
    chosen: dict[Family, Patch] = field(default_factory=dict)
    ways: dict[Family, int] = field(default_factory=dict)

    def run(self) -> Inference:
        """The plan with all that passes. Raises `PlanError` where the empty plan does not either: the model is not the same
        from call to call.
        """
        families: dict[Family, list[Proposal]] = {}
        for proposal in self.proposals:
            families.setdefault(proposal.family, []).append(proposal)
        kept, ends = list(families), self.ends
        rules, proof = self._try(kept, ends)
        if not proof:
            kept, ends, rules, proof = self._one_by_one(families, proof)
        if not proof:
            raise PlanError(f"{type(self.model).__name__}: its outputs differ between two calls: {proof.problem}.")
        rules, proof = self._gather(kept, ends, rules, proof)
        plan = self._plan(rules)
        cut = {wildcard(name) for row in plan if row.sharded for name in (row.name, row.name.rpartition(".")[0])}
        return Inference(plan, proof, {name: why for name, why in self.left.items() if name not in cut})

    @cached_property
    def _twins(self) -> Twins:
        return find_twins(self.reference.model)

    @cached_property
    def _exchanged(self) -> frozenset[str]:
        return exchanged(self.model, self.reference.model)

    def _plan(self, rules: Sequence[Rule]) -> Plan:
        return resolve(self.model, [*self.named.rules, *lifted(rules, self.reference.model, self.model)], self.size)

    def _gather(
        self, kept: Sequence[Family], ends: list[list[Rule]], rules: list[Rule], proof: Proof
    ) -> tuple[list[Rule], Proof]:
        """The rules with large layers that are still whole cut, and their outputs gathered, as far as that passes."""
        there = {name for name, _ in self.reference.model.named_modules()}
        found = [
            [rule for rule in family if rule.pattern in there]
            for family in gathered(self.model, self._plan(rules), self.size, self.left)
            if not self.named.touches(rule.pattern for rule in family)
        ]
        for more in ([rule for family in found for rule in family], *found) if len(found) > 1 else found:
            tried = self._try(kept, [*ends, more])
            if tried[1]:
                ends, (rules, proof) = [*ends, more], tried
                if len(more) == sum(map(len, found)):
                    break
        return rules, proof

    def _one_by_one(
        self, families: Mapping[Family, list[Proposal]], problem: Proof
    ) -> tuple[list[Family], list[list[Rule]], list[Rule], Proof]:
        """What passes of `families`, of which all together have a `problem`."""
        if self.named.rules and not (proof := self._try([], [])[1]):
            raise PlanError(f"{type(self.model).__name__}: the rules that it brings are wrong: {proof.problem}.")
        suspects = self._suspects(families, problem)
        kept = [family for family in families if not any(family in alike for alike in suspects)]
        if suspects and kept and self._try(kept, self.ends)[1]:
            ends = self.ends
        else:
            kept, suspects, ends = [], self._alike(families), [rules for rules in self.ends if self._end_passes(rules)]
        kept += [family for alike in suspects for family in self._passing(alike, families)]
        while True:
            rules, proof = self._try(kept, ends)
            if proof or not (kept or ends):
                return kept, ends, rules, proof
            names = [n for p in families[kept.pop()] for n in p.matrices] if kept else [rule.pattern for rule in ends.pop()]
            self._leave(names, f"right alone, and not together with the others: {proof.problem}")

    def _suspects(self, families: Mapping[Family, list[Proposal]], problem: Proof) -> list[list[Family]]:
        """The families around the place of a `problem`, each with those that are alike; none where it is in no family."""
        place = wildcard(problem.place)
        around = [family[0] for family in families if place == family[0] or place.startswith(f"{family[0]}.")]
        innermost = max(around, key=len, default=None)
        return [alike for alike in self._alike(families) if any(family[0] == innermost for family in alike)]

    def _alike(self, families: Mapping[Family, list[Proposal]]) -> list[list[Family]]:
        """Those of modules of one class that fall apart alike: attention to the text itself and to an encoder's states, which
        may share a cache.
        """
        found: dict[tuple[str, int, int], list[Family]] = {}
        for family, proposals in families.items():
            found.setdefault((*family[1:], proposals[0].groups), []).append(family)
        return list(found.values())

    def _passing(self, alike: Sequence[Family], families: Mapping[Family, list[Proposal]]) -> list[Family]:
        """Those that are right, all of them with one patch, or else each alone."""
        if len(alike) > 1:
            for patch in islice(patches(self.reference, families[alike[0]][0], self.size), FEW):
                self.chosen |= dict.fromkeys(alike, patch)
                if self._try(alike, [])[1]:
                    return list(alike)
        return [family for family in alike if self._passes(family, families[family])]

    def _leave(self, names: Iterable[str], why: str) -> None:
        self.left.update({wildcard(name): why for name in names})

    def _passes(self, family: Family, proposals: Sequence[Proposal]) -> bool:
        """Whether a family alone is right with some patch, which is then chosen."""
        first = ""
        for way in range(1 + len(proposals[0].others)):
            self.ways[family] = way
            for patch in islice(patches(self.reference, _in_way(proposals[0], way), self.size), FEW if way else None):
                self.chosen[family] = patch
                proof = self._try([family], [])[1]
                if proof:
                    return True
                first = first or str(proof.problem)
        self._leave((name for proposal in proposals for name in proposal.matrices), first)
        return False

    def _end_passes(self, rules: list[Rule]) -> bool:
        proof = self._try([], [rules])[1]
        if not proof:
            self._leave((rule.pattern for rule in rules), str(proof.problem))
        return bool(proof)

    def _try(self, families: Sequence[Family], ends: Sequence[list[Rule]]) -> tuple[list[Rule], Proof]:
        """The rules for these parts, everything else whole, and the proof of their plan."""
        proposals = [
            (_in_way(proposal, self.ways.get(proposal.family, 0)), self.chosen.get(proposal.family, NONE))
            for proposal in self.proposals
            if proposal.family in families
        ]
        rules = [
            *patched(self.reference.model, proposals, self.size),
            *(rule for tied in ends for rule in tied),
        ]
        rules = with_twins(switched(self.model, self._exchanged, rules), self._twins)
        heads = {rule.pattern for rule in rules if rule.style == "local_multihead"}
        rules += [replace(rule, source="inferred") for rule in encoders(self.reference.model, heads, self.size)]
        rules += self._whole({rule.pattern for rule in rules})
        try:
            return rules, check(self.reference, resolve(self.reference.model, [*self.named.rules, *rules], self.size))
        except PlanError as error:
            return rules, Proof.failed(self.size, str(error).splitlines()[0])

    def _whole(self, named: set[str]) -> list[Rule]:
        """Rules that name what stays whole, each with the reason."""
        found = []
        for name, module in self.reference.model.named_modules():
            places = [name] if isinstance(module, nn.Linear | nn.Embedding) else []
            places += [f"{name}.{child}" for child, p in module._parameters.items() if p is not None and p.dim() > 2]
            for place in (place for place in places if place not in named and not self.named.touches([place])):
                if (why := self.left.get(wildcard(place))) is not None:
                    found.append(Rule(place, "replicate", "inferred", reason=why))
        return found


def _in_way(proposal: Proposal, way: int) -> Proposal:
    return (proposal, *proposal.others)[min(way, len(proposal.others))]
