"""How far two results are apart, as numbers. Whatever cannot be compared (other names, other shapes) is infinitely far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.model_state import required_state

Tensors = Mapping[str, Tensor]


def largest_difference(given: Tensor, expected: Tensor) -> float:
    """The largest |a - b|."""
    return float((given - expected).abs().max()) if given.shape == expected.shape else math.inf


def series_difference(given: Sequence[float], expected: Sequence[float], relative: bool = False) -> float:
    """The largest |a - b| of two series of numbers, or with `relative` the largest |a - b| / |b|."""
    pairs = zip(given, expected, strict=True)
    return _largest(abs(a - b) / (abs(b) if relative else 1.0) for a, b in pairs)


def gradient_difference(given: Tensors, expected: Tensors) -> float:
    """The largest |a - b| of any parameter, over that parameter's largest |b|.

    A parameter whose gradients are all tiny is measured by a thousandth of the model's largest: noise over noise says nothing.
    """
    if not _comparable(given, expected):
        return math.inf
    floor = 1e-3 * max(float(value.abs().max()) for value in expected.values())
    return _largest(largest_difference(given[name], b) / max(float(b.abs().max()), floor) for name, b in expected.items())


def drift(given: Tensors, expected: Tensors, start: Tensors) -> float:
    """How far two trainings from `start` are apart, over the way they went: |a - b| / |b - start|, all parameters as one."""
    if not _comparable(given, expected):
        return math.inf
    apart = torch.stack([(given[name] - b).norm() for name, b in expected.items()]).norm()
    way = torch.stack([(b - start[name]).norm() for name, b in expected.items()]).norm()
    return float(apart / way)


def differing_tensors(given: Tensors, expected: Tensors) -> int:
    """How many tensors are not the same bit for bit, or stand on one side only."""
    names = given.keys() & expected.keys()
    same = sum(given[name].dtype == expected[name].dtype and torch.equal(given[name], expected[name]) for name in names)
    return len(given.keys() | expected.keys()) - same


def differing_tokens(given: Sequence[int], expected: Sequence[int]) -> int:
    """In how many places two sequences of tokens differ."""
    return sum(a != b for a, b in zip(given, expected, strict=False)) + abs(len(given) - len(expected))


def differing_files(given: Path, expected: Path) -> int:
    """How many files of two folders have other bytes, or stand in one of them only."""
    here, there = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (given, expected))
    return sum(here.get(name) != there.get(name) for name in here.keys() | there.keys())


def differing_replicas(model: nn.Module) -> int:
    """How many of the parameters that every rank keeps whole are not bit for bit the first rank's on some rank. Collective."""
    state = required_state(model)
    group, count = state.mesh.get_group(), 0
    for name, parameter in model.named_parameters():
        if not state.plan[name].sharded:
            first = parameter.detach().clone()
            dist.broadcast(first, group=group, group_src=0)
            differs = torch.tensor(int(not torch.equal(first, parameter.detach())))
            dist.all_reduce(differs, group=group)
            count += int(differs > 0)
    return count


def _largest(values: Iterable[float]) -> float:
    kept = list(values)  # `max` alone would pass over what is not a number
    return math.nan if any(map(math.isnan, kept)) else max(kept)


def _comparable(given: Tensors, expected: Tensors) -> bool:
    return given.keys() == expected.keys() and all(given[name].shape == b.shape for name, b in expected.items())
