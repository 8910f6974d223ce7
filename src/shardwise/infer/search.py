"""What a module needs besides cut weights: numbers of its own that become local, and biases of which it takes its heads'.

Only the proof knows; here is what to try, the likeliest first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from itertools import islice, product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shardwise.heads import heads_of
from shardwise.infer.feeds import floats
from shardwise.infer.lengths import Number, lengths, matrix_of, own_numbers
from shardwise.infer.proposals import Proposal
from shardwise.infer.simulate import Reference
from shardwise.layout import local_numbers
from shardwise.spec import Rule

MOST = 16
MOST_WIDTHS = 6
"""How many ways are tried of one family: with its input as it is, and with one of its parts' width."""
_MOST_NUMBERS = 7
_COUNTS: tuple[Counts, ...] = ("parts", "groups", "parts in a group")
_BIASES = ("alibi", "position_bias", "attention_mask")


_COLWISE = ("colwise", "packed_colwise")

Counts = Literal["parts", "groups", "parts in a group", "length"]
"""What a number counts, or features of: parts, groups of them that share something, or how many share it; or how long the one
matrix of its module is.
"""
Local = tuple[tuple[Number, Counts], ...]
"""Numbers that become local, those of all modules of one class alike."""


@dataclass(frozen=True)
class Patch:
    """What the modules of a proposal get besides cut weights.

    Args:
        numbers: those that become local, and what they count; modules by their path inside of the one around the proposal's
            products.
        own_bias: of a position bias of all heads that it is handed, the module around them takes those of its own.
        width: of its input, from which the module around them takes that of its own parts; 0 where it does not.
    """

    numbers: Local = ()
    own_bias: bool = False
    width: int = 0

    @property
    def style(self) -> str | None:
        """What becomes of the module around the products; None where numbers are all."""
        return "local_head_bias" if self.own_bias else "local_width" if self.width else None


NONE = Patch()


def patches(reference: Reference, proposal: Proposal, size: int) -> Iterator[Patch]:
    """What to try of the modules of a proposal, the likeliest first, `NONE` the very first."""
    if proposal.complete:
        yield NONE
        return
    module = reference.model.get_submodule(proposal.place)
    read, given = numbers_read(reference, proposal)
    own = [*own_numbers(reference.model, proposal, read)]
    known = {path for kinds in own for path, _ in kinds[0]}
    alike: dict[tuple[type[nn.Module], str], list[Number]] = {}
    for path, name in (number for number in read if number[0] not in known):
        alike.setdefault((type(module.get_submodule(path)), name), []).append((path, name))
    ways = _ways([(numbers, {read[number] for number in numbers}) for numbers in alike.values()], own, proposal, size)
    yield from islice(
        (Patch(way, own_bias) for way in ways for own_bias in ((False, True) if given.biased else (False,))), MOST
    )
    if given.width and given.width % proposal.count == 0:
        yield from (Patch(way, width=given.width) for way in ways[:MOST_WIDTHS])


def _ways(
    read: Sequence[tuple[Sequence[Number], set[int]]], own: Sequence[list[list[Number]]], proposal: Proposal, size: int
) -> list[Local]:
    """Which numbers may become local, and what they count then: none of them first, then the likeliest.

    Args:
        read: numbers of modules that are alike, and their values.
        own: those that say how long the matrix of their module is, of each kind of such modules.
    """
    options: list[list[tuple[int, Local]]] = []
    for ways in own:
        options.append([(2, ()), *((0, tuple((number, "length") for number in numbers)) for numbers in ways)])
    for numbers, values in read:
        counted: dict[tuple[tuple[int, ...], ...], tuple[int, Local]] = {}
        for counts in _COUNTS:
            unlike = [_unlike(value, counts, proposal) for value in values]
            if None not in unlike:
                local = tuple(_local(value, counts, proposal, size) for value in values)
                counted.setdefault(local, (max(filter(None, unlike), default=0), tuple((number, counts) for number in numbers)))
        if counted:
            here = sorted(counted.values(), key=lambda one: one[0])
            options.append([(0 if here[0][0] > 1 else 1, ()), *here])
    options = sorted(options, key=lambda one: -one[0][0])[:_MOST_NUMBERS]  # those that are likely to be local
    chosen = sorted(product(*options), key=lambda way: sum(cost for cost, _ in way))
    return list(dict.fromkeys([(), *(tuple(one for _, local in way for one in local) for way in chosen)]))


def _unlike(value: int, counts: Counts, proposal: Proposal) -> int | None:
    """How unlikely it is that `value` is a number of such things, or of features of them; None where it can't be."""
    if counts != "parts" and not proposal.groups:
        return None
    units = _units(counts, proposal)
    if value == units:
        return 0
    if counts == "parts in a group" or value < units or value % units:
        return None
    return 1 if value // units in proposal.widths else 3


def _units(counts: Counts, proposal: Proposal) -> int:
    """How many there are of what a number counts."""
    if counts == "parts":
        return proposal.count
    return proposal.groups if counts == "groups" else proposal.count // max(proposal.groups, 1)


def _local(value: int, counts: Counts, proposal: Proposal, size: int) -> tuple[int, ...]:
    """What each of `size` ranks has of it: of groups that ranks share, one."""
    if counts == "parts":
        return local_numbers(value, proposal.count, size)
    return (value // proposal.groups if counts == "groups" else value * proposal.groups // size,) * size


@dataclass(frozen=True)
class Given:
    """What a module is called with: whether with a position bias of all heads, and the width of its input, if it has one."""

    biased: bool
    width: int


def numbers_read(reference: Reference, proposal: Proposal) -> tuple[dict[Number, int], Given]:
    """The integers of the modules around a proposal's products, and of their configs, that code reads in a forward pass; and
    what the module around all of them is called with.
    """
    seen: dict[Number, int] = {}
    biases: list[bool] = []
    widths: list[int] = []
    place = reference.model.get_submodule(proposal.place)
    names = list(signature(type(place).forward).parameters)[1:]

    def look(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        biases.extend(_has_heads(given.get(name), name) for name in _BIASES)
        first = next(iter(given.values()), None)
        widths.append(first.shape[-1] if isinstance(first, Tensor) and first.dim() and first.is_floating_point() else 0)

    with ExitStack() as stack:
        stack.callback(place.register_forward_pre_hook(look, with_kwargs=True).remove)
        for name, module in place.named_modules():
            if _around_products(f"{proposal.place}.{name}".strip("."), proposal):
                stack.enter_context(_watched(module, name, seen))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            floats(reference.model, reference.feeds[0])
    return seen, Given(any(biases), widths[0] if len(set(widths)) == 1 else 0)


def _has_heads(given: object, name: str) -> bool:
    return isinstance(given, Tensor) and (name != "attention_mask" or (given.dim() == 4 and given.shape[1] > 1))


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


def patched(model: nn.Module, proposals: Iterable[tuple[Proposal, Patch]], size: int) -> list[Rule]:
    """The rules of `proposals`, each with what its modules need besides."""
    proposals, there = list(proposals), {name for name, _ in model.named_modules(remove_duplicate=False)}
    rules: dict[str, Rule] = {}
    for proposal, patch in proposals:
        rules |= {rule.pattern: rule for rule in proposal.rules}
        local: dict[str, dict[str, tuple[int, ...]]] = {proposal.place: {}} if patch.own_bias else {}
        if patch.width:
            local[proposal.place] = {"input_width": local_numbers(patch.width, proposal.count, size)}
        for (path, name), counts in patch.numbers:
            place = f"{proposal.place}.{path}".strip(".")
            if place not in there:  # parts of the same kinds share a patch, and may call their modules by other names
                continue
            value = _read(model.get_submodule(place), name)
            if value is None:  # as of a window that layers of another type have
                continue
            one = matrix_of(model, proposal, place) if counts == "length" else None
            numbers = lengths(model, one, size) if one is not None else _local(value, counts, proposal, size)
            local.setdefault(place, {})[name] = numbers
        for place, attributes in local.items():
            known = rules.get(place)
            style = patch.style if place == proposal.place and patch.style else known.style if known else "local_params"
            attributes = {**(known.attributes if known else {}), **attributes}
            reason = f"its code reads these numbers, and {proposal.count} parts are dealt"
            rules[place] = Rule(place, style, "inferred", attributes=attributes, reason=reason)
    around = [f"{proposal.place}.".lstrip(".") for proposal, patch in proposals if patch.width]
    for rule in list(rules.values()):
        if rule.style in _COLWISE and any(rule.pattern.startswith(place) for place in around):
            rules[rule.pattern] = replace(rule, style="colwise_whole_input")
    return [*rules.values(), *_norms_outside(model, (proposal for proposal, _ in proposals), rules)]


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


def _read(module: nn.Module, name: str) -> int | None:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, int) else None
