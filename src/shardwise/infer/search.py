"""What a module needs besides cut weights: numbers of its own that become local, and biases of which it takes its heads'.

Only the proof knows; here is what to try, the likeliest first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from itertools import combinations, islice
from typing import Any, Literal

import torch
from torch import nn

from shardwise.heads import heads_of
from shardwise.infer.feeds import floats
from shardwise.infer.proposals import Proposal
from shardwise.infer.simulate import Reference
from shardwise.layout import local_numbers
from shardwise.spec import Rule

MOST = 48
MOST_WIDTHS = 12
"""How many ways are tried of one family: with its input as it is, and with one of its parts' width."""
_COUNTS: tuple[Counts, ...] = ("parts", "groups", "parts in a group")
_BIASES = ("alibi", "position_bias", "attention_mask")


_COLWISE = ("colwise", "packed_colwise")

Number = tuple[str, str]
"""A number that code reads: a module's name, and the attribute (or "config.name") of it."""
Counts = Literal["parts", "groups", "parts in a group"]
"""What a number counts, or features of: what an island falls into, groups of them that share something, or how many share it."""
Group = tuple[tuple[Number, Counts], ...]
"""The same of all modules of one class."""


@dataclass(frozen=True)
class Patch:
    """What the modules of a proposal get besides cut weights.

    Args:
        numbers: those that become local, and what they count; modules by their path inside of the one around the proposal's
            products.
        own_bias: of a position bias of all heads that it is handed, the module around them takes those of its own.
        own_width: the module around them takes its width from its input, which is handed to it with that of its own parts.
    """

    numbers: Group = ()
    own_bias: bool = False
    own_width: bool = False

    @property
    def style(self) -> str | None:
        """What becomes of the module around the products; None where numbers are all."""
        return "local_head_bias" if self.own_bias else "local_width" if self.own_width else None


NONE = Patch()


def patches(reference: Reference, proposal: Proposal) -> Iterator[Patch]:
    """What to try of the modules of a proposal, the likeliest first, `NONE` the very first."""
    if proposal.complete:
        yield NONE
        return
    module = reference.model.get_submodule(proposal.place)
    read = numbers_read(reference, proposal)
    alike: dict[tuple[type[nn.Module], str], list[Number]] = {}
    for path, name in read:
        alike.setdefault((type(module.get_submodule(path)), name), []).append((path, name))
    found = [(numbers, {read[number] for number in numbers}) for numbers in alike.values()]
    names: list[Group] = []
    exact: list[Group] = []
    for counts in _COUNTS:
        for numbers, values in found:
            if all(_counted(value, counts, proposal) for value in values):
                names.append(tuple((number, counts) for number in numbers))
                if values == {_units(counts, proposal)} and not any(_numbers(names[-1]) == _numbers(one) for one in exact):
                    exact.append(names[-1])
    biased = any(name in signature(type(module).forward).parameters for name in _BIASES)
    ways = ((sum(chosen, ()), own) for chosen in _subsets(names, exact) for own in ((False, True) if biased else (False,)))
    yield from dict.fromkeys(Patch(*way) for way in islice(ways, MOST))
    if _input_width(reference.model, proposal):
        widths = islice(_subsets(names, exact), MOST_WIDTHS)
        yield from dict.fromkeys(Patch(sum(chosen, ()), own_width=True) for chosen in widths)


def _numbers(group: Group) -> set[Number]:
    return {number for number, _ in group}


def _units(counts: Counts, proposal: Proposal) -> int:
    """How many there are of what a number counts."""
    if counts == "parts":
        return proposal.count
    return proposal.groups if counts == "groups" else proposal.count // max(proposal.groups, 1)


def _counted(value: int, counts: Counts, proposal: Proposal) -> bool:
    """Whether `value` may be a number of such things, or of features of them."""
    if counts != "parts" and not proposal.groups:
        return False
    units = _units(counts, proposal)
    return value == units if counts == "parts in a group" else value >= units and value % units == 0


def _local(value: int, counts: Counts, proposal: Proposal, size: int) -> tuple[int, ...]:
    """What each of `size` ranks has of it: of groups that ranks share, one."""
    if counts == "parts":
        return local_numbers(value, proposal.count, size)
    return (value // proposal.groups if counts == "groups" else value * proposal.groups // size,) * size


def _subsets(names: Sequence[Group], exact: Sequence[Group]) -> Iterator[tuple[Group, ...]]:
    """Some of the groups, the likeliest first; none of them twice, as another number."""
    yield ()
    ways = (names, exact, *(chosen for number in range(1, len(names)) for chosen in combinations(names, number)))
    for chosen in map(tuple, ways):
        if len(set().union(*map(_numbers, chosen))) == sum(map(len, chosen)):
            yield chosen


def numbers_read(reference: Reference, proposal: Proposal) -> dict[Number, int]:
    """The integers of the modules around a proposal's products, and of their configs, that code reads in a forward pass."""
    seen: dict[Number, int] = {}
    place = reference.model.get_submodule(proposal.place)
    with ExitStack() as stack:
        for name, module in place.named_modules():
            if _around_products(f"{proposal.place}.{name}".strip("."), proposal):
                stack.enter_context(_watched(module, name, seen))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            floats(reference.model, reference.feeds[0])
    return seen


def _around_products(name: str, proposal: Proposal) -> bool:
    if name in proposal.matrices:
        return False
    inside = (*proposal.matrices, *(rule.pattern for rule in proposal.rules))
    return name == proposal.place or any(one.startswith(f"{name}.") for one in inside)


@contextmanager
def _watched(module: nn.Module, path: str, seen: dict[Number, int]) -> Iterator[None]:
    kind, config = type(module), module.__dict__.get("config")

    def note(name: str, value: object) -> None:
        if isinstance(value, int) and not isinstance(value, bool) and value > 1 and not name.rpartition(".")[2].startswith("_"):
            seen[path, name] = value

    class Config:
        """The module's config, read through."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(config, name)
            note(f"config.{name}", value)
            return value

    def read(self: nn.Module, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        note(name, value)
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


def patched(
    model: nn.Module, proposals: Iterable[Proposal], chosen: Mapping[tuple[str, str, int], Patch], size: int
) -> list[Rule]:
    """The rules of `proposals`, with what their modules need besides."""
    rules: dict[str, Rule] = {}
    for proposal in proposals:
        rules |= {rule.pattern: rule for rule in proposal.rules}
        patch = chosen.get(proposal.family, NONE)
        local: dict[str, dict[str, tuple[int, ...]]] = {proposal.place: {}} if patch.own_bias else {}
        if patch.own_width:
            width = _input_width(model, proposal)
            local[proposal.place] = {"input_width": local_numbers(width, proposal.count, size)}
            inside = [rule for rule in proposal.rules if rule.style in _COLWISE]
            rules |= {rule.pattern: replace(rule, style="colwise_whole_input") for rule in inside}
        for (path, name), counts in patch.numbers:
            place = f"{proposal.place}.{path}".strip(".")
            value = _read(model.get_submodule(place), name)
            local.setdefault(place, {})[name] = _local(value, counts, proposal, size)
        for place, attributes in local.items():
            known = rules.get(place)
            style = patch.style if place == proposal.place and patch.style else known.style if known else "local_params"
            attributes = {**(known.attributes if known else {}), **attributes}
            reason = f"its code reads these numbers, and {proposal.count} parts are dealt"
            rules[place] = Rule(place, style, "inferred", attributes=attributes, reason=reason)
    return [*rules.values(), *_norms_outside(model, proposals, rules)]


def _norms_outside(model: nn.Module, proposals: Iterable[Proposal], rules: Mapping[str, Rule]) -> Iterator[Rule]:
    """Attention's norms that no part reads: what they normalise is whole, whatever their names say (a `q_norm` in front of
    `q_proj`).
    """
    for place in dict.fromkeys(proposal.place for proposal in proposals if not proposal.complete):
        module = model.get_submodule(place)
        for child, norm in module.named_children() if heads_of(module) is not None else ():
            name = f"{place}.{child}"
            if "norm" in child and name not in rules and f"{name}.weight" not in rules and not norm._modules:
                yield Rule(name, "replicate", "inferred", reason="what it normalises is whole")


def _input_width(model: nn.Module, proposal: Proposal) -> int:
    """The features that all column-wise layers of a proposal read, where its parts can have as many each; else 0."""
    modules = dict(model.named_modules())  # rules name parameters, too
    layers = [modules.get(rule.pattern) for rule in proposal.rules if rule.style in _COLWISE]
    widths = {module.in_features for module in layers if isinstance(module, nn.Linear)}
    width = widths.pop() if len(widths) == 1 else 0
    return width if width % proposal.count == 0 else 0


def _read(module: nn.Module, name: str) -> int:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return int(value)
