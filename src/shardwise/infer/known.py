"""Modules that are dealt as we know, not as their products read each other: proposals that are proven as every other is.

A recurrence mixes what it is given in ways that no product shows: a product in its middle reads all channels and is read by
all, statistics go over all heads, a fused kernel on another device reads weights past their modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from shardwise.infer.products import Product
from shardwise.infer.proposals import Proposal
from shardwise.plans.known import known_rules


def known_proposals(model: nn.Module, size: int) -> Iterator[Proposal]:
    """A proposal for each module of `model` that is known by what is in it, and that `size` ranks can share."""
    for name, module in model.named_modules():
        rules = known_rules(name, module, size)
        if rules is None:
            continue
        own = tuple(replace(rule, source="inferred") for rule in rules)
        matrices = tuple(f"{name}.{child}" for child in module._modules)
        numel = sum(parameter.numel() for parameter in module.parameters())
        yield Proposal(name, type(module).__name__, size, own, (), matrices, numel, complete=True)


def outside(products: Iterable[Product], known: Iterable[Proposal]) -> list[Product]:
    """Those of `products` that are in none of the `known` modules."""
    places = tuple(f"{proposal.place}." for proposal in known)
    return [product for product in products if not product.weight.startswith(places)]
