"""Islands as rules that an ordinary plan is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from shardwise.infer.islands import EVERY, Island
from shardwise.infer.layouts import cuts
from shardwise.infer.products import Product
from shardwise.layers import ALIGNED, Cut, StackedColwise, stores_transposed
from shardwise.plan import wildcard
from shardwise.spec import Rule

COMPUTED = "what the model computes falls apart into {} parts"
SUMMED = "read whole by each of {} parts"


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

    @property
    def family(self) -> tuple[str, str, int]:
        """Layers are alike: one family for all that differ in their numbers alone."""
        return wildcard(self.place), self.kind, self.count


class NotPossible(Exception):
    """Why an island can't be written as rules, in words."""


def propose(model: nn.Module, island: Island, size: int, elsewhere: Iterable[Product]) -> Proposal:
    """The rules that deal `island` to `size` ranks.

    Args:
        model: what it was found in.
        elsewhere: the products whose outputs are read by others, too.

    Raises `NotPossible`.
    """
    if island.count < size:
        raise NotPossible(f"it falls into {island.count} parts alone")
    read_elsewhere = set(elsewhere) & set(island.producers)
    if both := island.consumers.keys() & island.producers.keys():
        raise NotPossible(f"{next(iter(both)).weight} is read and reads in it")
    sides = [*island.producers.values(), *island.consumers.values(), *(owners for _, owners in island.sliced.values())]
    found = cuts(sides, size)
    if found is None:
        raise NotPossible(f"the indices of its parts lie in no order that {size} ranks can share by blocks")
    count = island.count
    if not island.groups and any(model.get_parameter(product.weight).dim() > 2 for product in island.products):
        found, count = _aligned(found, count, size)
    cut_of = dict(zip((*island.producers, *island.consumers, *island.sliced), found, strict=True))
    targets = {product: _target(model, product) for product in island.products}
    reason = COMPUTED.format(island.count)
    rules: list[Rule] = []
    for product in island.products:
        name, bare = targets[product]
        consumer = product in island.consumers
        whole = not consumer and set(island.producers[product]) == {EVERY}
        if product in read_elsewhere:
            rules.append(_latent(model, name, whole, product))
            continue
        if product.inputs is None and whole:
            rules.append(_summed(model, product.weight, island))
            continue
        dim = product.inputs if consumer else product.outputs
        assert dim is not None
        if bare:
            style = _style_along(model, product.weight, dim)
        elif product.inputs == 2:
            style = "stacked_rowwise" if consumer else "stacked_colwise"
        else:
            style = "rowwise" if consumer else "colwise"
        cut = cut_of[product]
        assert isinstance(cut, Cut)
        rules.append(Rule(name, _packed(style, cut), "inferred", cut, reason=SUMMED.format(island.count) if whole else reason))
    rules += _bare_rules([target for product, target in targets.items() if product.inputs is not None], island)
    for name, (dim, _) in island.sliced.items():
        rules.append(Rule(name, _style_along(model, name, dim), "inferred", cut_of[name], reason=reason))
    rules += [_summed(model, name, island) for name in island.shared]
    numel = sum(_numel(model, product) for product in island.products if not _whole(island, product))
    names = tuple(dict.fromkeys(name for name, _ in targets.values()))
    place = _around(names)
    kind, widths = type(model.get_submodule(place)).__name__, frozenset(width for cut in found for width in _widths(cut))
    proposed = Proposal(place, kind, count, tuple(rules), island.products, names, numel)
    return replace(proposed, groups=island.groups, widths=widths)


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


def _whole(island: Island, product: Product) -> bool:
    return product in island.producers and set(island.producers[product]) == {EVERY}


def _numel(model: nn.Module, product: Product) -> int:
    return model.get_parameter(product.weight).numel()


def _target(model: nn.Module, product: Product) -> tuple[str, bool]:
    """The linear layer or stacked product that `product` is, or its bare parameter (True)."""
    owner, _, child = product.weight.rpartition(".")
    module = model.get_submodule(owner)
    if (product.inputs, product.outputs) == (2, 1) and StackedColwise.refuses(module) is None:
        return owner, False
    linear = child == "weight" and (isinstance(module, nn.Linear) or stores_transposed(module))
    if linear and product.inputs is not None:
        expected = (0, 1) if stores_transposed(module) else (1, 0)
        if (product.inputs, product.outputs) != expected:
            raise NotPossible(f"{product.weight} is used transposed")
    return (owner, False) if linear else (product.weight, True)


def _style_along(model: nn.Module, name: str, dim: int) -> str:
    """The style that cuts dim `dim` of a parameter that a rule names itself."""
    dims = model.get_parameter(name).dim()
    if dims == 1 or dim == dims - 2:
        return "colwise"
    if dim == dims - 1:
        return "rowwise"
    if dim == 0:
        return "local_rows"
    raise NotPossible(f"{name} would be cut along dim {dim} of {dims}")


def _packed(style: str, cut: Cut) -> str:
    return f"packed_{style}" if cut.blocks and not style.startswith("stacked") else style


def _latent(model: nn.Module, name: str, whole: bool, product: Product) -> Rule:
    """A projection to a latent, which is expanded elsewhere, and to what all heads read (multi-head latent attention)."""
    parent = model.get_submodule(name.rpartition(".")[0])
    config = getattr(parent, "config", None)
    if whole and (hasattr(parent, "qk_rope_head_dim") or hasattr(config, "qk_rope_head_dim")):
        return Rule(name, "mla_kv_a_proj", "inferred", reason="a latent, and what all heads read")
    raise NotPossible(f"{product.weight} is read elsewhere, too")


def _bare_rules(targets: Iterable[tuple[str, bool]], island: Island) -> list[Rule]:
    found = list(targets)
    bare = [name for name, is_bare in found if is_bare]
    if not bare:
        return []
    owners = {name.rpartition(".")[0] for name in bare}
    if len(owners) > 1 or len(bare) < len(found) or "" in owners:
        raise NotPossible(f"{bare[0]} belongs to no linear layer, nor do all products of one module")
    return [Rule(owners.pop(), "moe_tp_experts", "inferred", reason=COMPUTED.format(island.count))]


def _summed(model: nn.Module, name: str, island: Island) -> Rule:
    """For a parameter that each part reads whole: its gradient is summed."""
    owner = name.rpartition(".")[0]
    module = model.get_submodule(owner)
    alone = not module._modules and sum(1 for p in module._parameters.values() if p is not None) == 1
    reason = SUMMED.format(island.count)
    return Rule(owner if alone else name, "replicated_with_grad_allreduce", "inferred", reason=reason)


def _around(modules: Sequence[str]) -> str:
    """The innermost module around several modules and parameters, by their names."""
    parents = [name.split(".")[:-1] for name in modules]
    common = [segments[0] for segments in zip(*parents, strict=False) if len(set(segments)) == 1]
    depth = next((at for at, segments in enumerate(zip(*parents, strict=False)) if len(set(segments)) > 1), len(common))
    return ".".join(parents[0][:depth])
