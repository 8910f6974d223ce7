"""Islands as rules that an ordinary plan is made of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from shardwise.infer.islands import EVERY, Island
from shardwise.infer.layouts import cuts, unfolded
from shardwise.infer.products import Product
from shardwise.infer.targets import SUMMED, NotPossible, around, latent, packed, runner, style_along, summed, target
from shardwise.layers import ALIGNED, Cut
from shardwise.plan import wildcard
from shardwise.spec import Rule

COMPUTED = "what the model computes falls apart into {} parts"


@dataclass(frozen=True)
class Proposal:
    """The rules for one island.

    Args:
        place: the module around all of its products, whose code may read numbers that become local.
        kind: its class.
        count: into how many parts it falls.
        rules: for its products and parameters.
        products: what it consists of.
        matrices: the modules or parameters that hold the products' weights.
        numel: elements that are cut.
        complete: the rules say all that its modules need: no number of theirs is to be searched for.
        groups: as of the island.
        widths: of how many neighbouring indices its parts are, along any of its dims.
        others: further ways to write the same, to be tried in turn.
    """

    place: str
    kind: str
    count: int
    rules: tuple[Rule, ...]
    products: tuple[Product, ...]
    matrices: tuple[str, ...]
    numel: int
    complete: bool = False
    groups: int = 0
    widths: frozenset[int] = frozenset()
    others: tuple[Proposal, ...] = ()

    @property
    def family(self) -> tuple[str, str, int]:
        """Layers are alike: one family for all that differ in their numbers alone."""
        return wildcard(self.place), self.kind, self.count


def propose(model: nn.Module, island: Island, size: int, elsewhere: Iterable[Product]) -> Proposal:
    """The rules that deal `island` to `size` ranks.

    Args:
        model: what it was found in.
        elsewhere: the products whose outputs are read by others, too.

    Raises `NotPossible`.
    """
    if island.count < size:
        raise NotPossible(f"it falls into {island.count} parts alone")
    if both := island.consumers.keys() & island.producers.keys():
        raise NotPossible(f"{next(iter(both)).weight} is read and reads in it")
    sides = [*island.producers.values(), *island.consumers.values(), *(owners for _, owners in island.sliced.values())]
    found = cuts(sides, size)
    if found is None:
        raise NotPossible(f"the indices of its parts lie in no order that {size} ranks can share by blocks")
    count = island.count
    if not island.groups and any(model.get_parameter(product.weight).dim() > 2 for product in island.products):
        found, count = _aligned(found, count, size)
    draft = _Draft(model, island, dict(zip((*island.producers, *island.consumers, *island.sliced), found, strict=True)))
    read_elsewhere = set(elsewhere) & set(island.producers)
    widths = frozenset(width for cut in found for width in _widths(cut))
    ways = [replace(way, count=count, groups=island.groups, widths=widths) for way in draft.ways(read_elsewhere)]
    return replace(ways[0], others=tuple(ways[1:]))


@dataclass(frozen=True)
class _Draft:
    """An island on its way to rules.

    Args:
        model: what it was found in.
        island: the island.
        cut_of: how to cut along the features of its products, and its parameters.
    """

    model: nn.Module
    island: Island
    cut_of: Mapping[Product | str, Cut]

    def ways(self, elsewhere: Collection[Product]) -> list[Proposal]:
        """The ways to write it, the fastest first: of bare parameters, those that sum once around a module come before the one
        that sums behind each product. `elsewhere` are the products whose outputs are read by others, too.

        Raises `NotPossible` where there is none.
        """
        targets = {product: target(self.model, product) for product in self.island.products}
        bare = [(p, runner(self.model, name)) for p, (name, is_bare) in targets.items() if is_bare and p.inputs is not None]
        if not bare:
            return [self._proposal(targets, self._rules(targets, elsewhere))]
        found, problems = [], []
        owners = {owner for product, owner in bare if not self._whole(product)}
        places = [place for owner in owners for place in (owner, owner.rpartition(".")[0]) if place and len(owners) == 1]
        for place in (*places, None):
            try:
                if place is None:
                    rules = [*self._rules(targets, elsewhere), *self._at_products(bare)]
                    found.append(self._proposal(targets, rules))
                else:
                    found.append(self._summed_around(place, targets))
            except NotPossible as problem:
                problems.append(problem)
        if not found:
            raise problems[0]
        return found

    def _at_products(self, bare: Iterable[tuple[Product, str]]) -> Iterable[Rule]:
        """With a sum at each product, in the modules whose code multiplies."""
        for product, at in bare:
            yield self._rule(at, "products")
            owner = product.weight.rpartition(".")[0]
            if owner != at:
                yield self._rule(owner, "local_params")

    def _summed_around(self, place: str, targets: Mapping[Product, tuple[str, bool]]) -> Proposal:
        """With one sum around the module at `place`: its arguments are whole, and its products all of bare parameters."""
        inside = {product: target for product, target in targets.items() if product.weight.startswith(f"{place}.")}
        for product, (name, _) in targets.items():
            if product in inside and not inside[product][1]:
                raise NotPossible(f"{name} is a layer beside bare parameters")
            if product not in inside and not self._whole(product):
                raise NotPossible(f"{name} lies outside of {place}")
        if outside := next((name for name in self.island.sliced if not name.startswith(f"{place}.")), None):
            raise NotPossible(f"{outside} lies outside of {place}")
        rules = [*self._rules(inside, ()), self._rule(place, "moe_tp_experts")]
        rules = [rule for rule in rules if rule.pattern.startswith(place)]  # the rest is summed as an argument
        module, named = self.model.get_submodule(place), {rule.pattern for rule in rules}
        rules += [
            Rule(f"{place}.{child}", "moe_identity_expert", "inferred", reason="an expert that returns what it is given")
            for child, identity in module.named_children()
            if isinstance(identity, nn.Identity)
        ]
        for name, parameter in module.named_parameters(prefix=place):
            direct = name.rpartition(".")[0] == place
            if name not in named and not (direct and (parameter.dim() < 2 or "bias" in name.rpartition(".")[2])):
                rules.append(summed(self.model, name, self.island))
        return self._proposal(inside, rules)

    def _rules(self, targets: Mapping[Product, tuple[str, bool]], elsewhere: Collection[Product]) -> list[Rule]:
        """For the products and parameters; `elsewhere` are the products whose outputs are read by others, too."""
        island, count = self.island, self.island.count
        rules: list[Rule] = []
        for product, (name, bare) in targets.items():
            whole = self._whole(product)
            if product in elsewhere:
                rules.append(latent(self.model, name, whole, product))
            elif product.inputs is None and whole:
                rules.append(summed(self.model, product.weight, island))
            else:
                style, cut = self._styled(product, bare)
                rules.append(Rule(name, style, "inferred", cut, reason=(SUMMED if whole else COMPUTED).format(count)))
                if bare and product.bias is not None and product in island.producers:
                    rules.append(replace(rules[-1], pattern=product.bias, style=packed("colwise", cut)))
        for name, (dim, _) in island.sliced.items():
            rules.append(replace(self._rule(name, style_along(self.model, name, dim)), cut=self.cut_of[name]))
        return rules + [summed(self.model, name, island) for name in island.shared]

    def _styled(self, product: Product, bare: bool) -> tuple[str, Cut]:
        consumer = product in self.island.consumers
        dim, fold = (product.inputs, product.input_fold) if consumer else (product.outputs, product.output_fold)
        assert dim is not None
        if bare:
            style = style_along(self.model, product.weight, dim)
        elif product.inputs == 2:
            style = "stacked_rowwise" if consumer else "stacked_colwise"
        else:
            style = "rowwise" if consumer else "colwise"
        length = fold.features(self.model.get_parameter(product.weight).shape[dim])
        cut = unfolded(self.cut_of[product], fold.pieces, fold.inner, length)
        if cut is None:
            raise NotPossible(f"parts of {product.weight} end within its dim {dim}")
        return packed(style, cut), cut

    def _rule(self, name: str, style: str) -> Rule:
        return Rule(name, style, "inferred", reason=COMPUTED.format(self.island.count))

    def _proposal(self, targets: Mapping[Product, tuple[str, bool]], rules: Iterable[Rule]) -> Proposal:
        rules = tuple(rules)
        numel = sum(self.model.get_parameter(product.weight).numel() for product in targets if not self._whole(product))
        names = tuple(dict.fromkeys(name for name, _ in targets.values()))
        place = around(names)
        if any(rule.pattern == place.rpartition(".")[0] for rule in rules):  # what is summed around it is its parent
            place = place.rpartition(".")[0]
        kind = type(self.model.get_submodule(place)).__name__
        return Proposal(place, kind, self.island.count, rules, tuple(targets), names, numel)

    def _whole(self, product: Product) -> bool:
        return product in self.island.producers and set(self.island.producers[product]) == {EVERY}


def _aligned(found: list[Cut], count: int, size: int) -> tuple[list[Cut], int]:
    """Cuts between so many parts together that rows of stacked matrices are of whole 16 bytes, as grouped products want them;
    and how many of those there are. As they are where that leaves a rank nothing.
    """
    if count % ALIGNED or count // ALIGNED < size:
        return found, count
    return [_coarser(cut) for cut in found], count // ALIGNED


def _coarser(cut: Cut) -> Cut:
    blocks = tuple(block if block.spread == "whole" else replace(block, unit=block.unit * ALIGNED) for block in cut.blocks)
    return replace(cut, unit=cut.unit if blocks else cut.unit * ALIGNED, blocks=blocks)


def _widths(cut: Cut) -> list[int]:
    return [block.unit for block in cut.blocks if block.spread != "whole"] or [cut.unit]
