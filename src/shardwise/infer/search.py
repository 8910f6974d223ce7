"""What a module needs besides cut weights: numbers of its own that become local, and biases of which it takes its heads'.

Only the proof knows; here is what to try, the likeliest first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import combinations
from typing import Any

import torch
from torch import nn

from shardwise.infer.proposals import Proposal, local_counts
from shardwise.infer.prove import Reference, floats
from shardwise.spec import Rule

MOST = 48
"""How many ways are tried of one family."""
_BIASES = ("alibi", "position_bias", "attention_mask")


@dataclass(frozen=True)
class Patch:
    """What a module gets besides cut weights.

    Args:
        attributes: numbers of the module (or "config.name" of its config) that become local.
        own_bias: of a position bias of all heads that it is handed, it takes those of its own.
    """

    attributes: tuple[str, ...] = ()
    own_bias: bool = False


NONE = Patch()


def patches(reference: Reference, proposal: Proposal, size: int) -> Iterator[Patch]:
    """What to try of the module around a proposal's products, the likeliest first, `NONE` the very first."""
    module = reference.model.get_submodule(proposal.place)
    read = numbers_read(reference, proposal.place)
    names = [name for name, value in read.items() if value >= proposal.count and value % proposal.count == 0]
    exact = [name for name in names if read[name] == proposal.count]
    biased = any(name in signature(type(module).forward).parameters for name in _BIASES)
    tried: list[Patch] = []
    for attributes in (*_subsets(names, exact),):
        for own_bias in (False, True) if biased else (False,):
            patch = Patch(attributes, own_bias)
            if patch not in tried and len(tried) < MOST:
                tried.append(patch)
                yield patch


def _subsets(names: Sequence[str], exact: Sequence[str]) -> Iterator[tuple[str, ...]]:
    yield ()
    yield tuple(names)
    yield tuple(exact)
    for number in range(1, len(names)):
        yield from combinations(names, number)


def numbers_read(reference: Reference, place: str) -> dict[str, int]:
    """The integers of the module at `place`, and of its config, that its code reads in a forward pass."""
    seen: dict[str, int] = {}
    module = reference.model.get_submodule(place)
    with _watched(module, seen), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        floats(reference.model, reference.feeds[0])
    return seen


@contextmanager
def _watched(module: nn.Module, seen: dict[str, int]) -> Iterator[None]:
    kind = type(module)
    config = module.__dict__.get("config")

    def note(prefix: str, name: str, value: object) -> None:
        if isinstance(value, int) and not isinstance(value, bool) and value > 1 and not name.startswith("_"):
            seen[prefix + name] = value

    class Config:
        """The module's config, read through."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(config, name)
            note("config.", name, value)
            return value

    def read(self: nn.Module, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if "." not in name:
            note("", name, value)
        return value

    module.__class__ = type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})
    if config is not None:
        module.__dict__["config"] = Config()
    try:
        yield
    finally:
        module.__class__ = kind
        if config is not None:
            module.__dict__["config"] = config


def patched(model: nn.Module, proposals: Iterable[Proposal], chosen: Mapping[str, Patch], size: int) -> list[Rule]:
    """The rules of `proposals`, with what their modules need besides."""
    rules: dict[str, Rule] = {}
    for proposal in proposals:
        rules |= {rule.pattern: rule for rule in proposal.rules}
        patch = chosen.get(proposal.family, NONE)
        if patch == NONE:
            continue
        module, counts = model.get_submodule(proposal.place), local_counts(proposal.count, size)
        local = {name: tuple(_read(module, name) // proposal.count * n for n in counts) for name in patch.attributes}
        known = rules.get(proposal.place)
        style = "local_head_bias" if patch.own_bias else known.style if known else "local_params"
        attributes = {**(known.attributes if known else {}), **local}
        reason = f"its code reads these numbers, and {proposal.count} parts are dealt"
        rules[proposal.place] = Rule(proposal.place, style, "inferred", attributes=attributes, reason=reason)
    return list(rules.values())


def _read(module: nn.Module, name: str) -> int:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return int(value)
