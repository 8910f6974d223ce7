"""How far the ranks' numbers are from one process's, and how far they may be."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from shardwise.model_state import ModelState, required_state
from shardwise.verify.measure import Found, Generated

Tensors = Mapping[str, Tensor]

LOGITS = 1e-4
LOSS = 1e-5
GRADIENTS = 1e-3
"""Relative bounds in float32. Sums of some 100 terms in another order differ by 1e-6 of their size, and layers amplify that; a
term that is lost or doubled is 1e-2 at least. A gradient that is not summed, or twice, is wrong by half of itself or itself."""

ROUNDINGS, ROUNDINGS_OF_ONE = 2.0, 4.0
"""Bounds in lower precision, as multiples of one process's own rounding error: of the outputs (0.9 to 1.3 is usual), and of
single numbers and parameters, where one process may be lucky."""

_SMALL = (
    1e-3  # a gradient that should be zero is the noise of the sums that cancel in it; against its own size any error is large
)


@dataclass(frozen=True)
class Measure:
    """A number with its bound, and where it was found."""

    value: float
    bound: float
    place: str = ""

    @property
    def ratio(self) -> float:
        """Over the bound: what is not a number is the worst."""
        return math.inf if math.isnan(self.value) else self.value / self.bound if self.bound else self.value


def worst(measures: Sequence[Measure]) -> Measure:
    """The one that is most over its bound."""
    return max(measures, key=lambda one: one.ratio)


def relative(given: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The largest |a - b| over the largest |b|, or over `floor` where that is larger. Infinite for other shapes."""
    if given.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    size = max(float(expected.abs().max()), floor)
    apart = float((given.double() - expected.double()).abs().max())
    return apart / size if size else (0.0 if apart == 0 else math.inf)


class Exact:
    """Comparison in float32 or better: by the largest difference, relative to the largest right value.

    Args:
        tighter: what the bounds of float32 are multiplied by.
    """

    unit = ""

    def __init__(self, tighter: float = 1.0) -> None:
        self.tighter = tighter

    def outputs(self, given: Found, one: Found, exact: Found | None) -> Measure:
        """Of the logits."""
        return Measure(relative(given.outputs, one.outputs), LOGITS * self.tighter, position(given.outputs, one.outputs))

    def loss(self, given: Found, one: Found, exact: Found | None) -> Measure:
        """Of the loss."""
        return Measure(abs(given.loss - one.loss) / max(1.0, abs(one.loss)), LOSS * self.tighter)

    def gradients(self, given: Tensors, one: Tensors, exact: Tensors | None) -> Measure:
        """The worst parameter's."""
        return worst([Measure(e, GRADIENTS * self.tighter, name) for name, e in gradient_errors(given, one).items()])


class Rounded:
    """Comparison in lower precision: the distance to float32 over the distance that one process has."""

    unit = "x the rounding of one process"

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def outputs(self, given: Found, one: Found, exact: Found | None) -> Measure:
        """Of the logits, all as one vector."""
        assert exact is not None
        if given.outputs.shape != exact.outputs.shape:
            return Measure(math.inf, ROUNDINGS)
        noise = float(torch.dist(one.outputs, exact.outputs)) or self.epsilon * float(exact.outputs.norm())
        return Measure(float(torch.dist(given.outputs, exact.outputs)) / noise, ROUNDINGS)

    def loss(self, given: Found, one: Found, exact: Found | None) -> Measure:
        """Of the loss."""
        assert exact is not None
        noise = max(abs(one.loss - exact.loss), self.epsilon * abs(exact.loss))
        return Measure(abs(given.loss - exact.loss) / noise, ROUNDINGS_OF_ONE)

    def gradients(self, given: Tensors, one: Tensors, exact: Tensors | None) -> Measure:
        """The worst parameter's; one that one process rounds less than most is held to what is usual."""
        assert exact is not None
        ours, noise = gradient_errors(given, exact), gradient_errors(one, exact)
        usual = max(statistics.median(noise.values()), self.epsilon)
        return worst([Measure(e / max(noise.get(name, usual), usual), ROUNDINGS_OF_ONE, name) for name, e in ours.items()])


Comparison = Exact | Rounded


def comparison(dtype: torch.dtype) -> Comparison:
    """How numbers of `dtype` are compared."""
    if dtype in (torch.float32, torch.float64):
        return Exact(1e-6 if dtype == torch.float64 else 1.0)
    return Rounded(torch.finfo(dtype).eps)


def gradient_errors(given: Tensors, expected: Tensors) -> dict[str, float]:
    """Each parameter's error: see `relative`. Infinite for one that has a gradient on one side only."""
    largest = max((float(value.abs().max()) for value in expected.values() if value.numel()), default=0.0)
    floor = _SMALL * largest
    names = [*expected, *(name for name in given if name not in expected)]
    both = {name: name in given and name in expected for name in names}
    return {name: relative(given[name], expected[name], floor) if both[name] else math.inf for name in names}


def position(given: Tensor, expected: Tensor) -> str:
    """Where two tensors differ most, or their shapes."""
    if given.shape != expected.shape:
        return f"{list(given.shape)} instead of {list(expected.shape)}"
    apart = (given - expected).abs().flatten()
    if not apart.numel() or float(apart.max()) == 0:
        return ""
    return str([int(i) for i in torch.unravel_index(apart.argmax(), expected.shape)])


def token_differences(given: Generated, one: Generated, noise: float) -> tuple[int, int]:
    """How many rows of generated tokens differ, and how many more do so only because two logits were equal but for noise.

    A row counts as the latter if, at its first other token, the one that the ranks took is within `noise` (relative to the
    largest logit) of the likeliest one; what follows is then another text, and not compared.
    """
    differ = ties = 0
    if given.tokens.shape != one.tokens.shape:
        return max(len(given.tokens), len(one.tokens)), 0
    for row, (mine, right) in enumerate(zip(given.tokens, one.tokens, strict=True)):
        places = (mine != right).nonzero().flatten().tolist()
        if not places:
            continue
        if one.logits is not None and one.logits.shape[1] == len(right):
            logits = one.logits[row, places[0]]
            gap = float((logits[right[places[0]]] - logits[mine[places[0]]]).abs())
            if gap <= 2 * noise * float(logits[logits.isfinite()].abs().max()):
                ties += 1
                continue
        differ += 1
    return differ, ties


def saved_differences(given: Path, expected: Path) -> list[str]:
    """The keys of two saved checkpoints whose tensors are not the same bit for bit, or that stand in one of them only."""
    ours, theirs = _keys(given), _keys(expected)
    odd = [key for key in {**theirs, **ours} if key not in ours or key not in theirs]
    for key in ours.keys() & theirs.keys():
        with safe_open(ours[key], "pt") as here, safe_open(theirs[key], "pt") as there:
            mine, right = here.get_tensor(key), there.get_tensor(key)
        if mine.dtype != right.dtype or mine.shape != right.shape or _digest(mine) != _digest(right):
            odd.append(key)
    return sorted(odd)


def saved_tensor(folder: Path, key: str) -> Tensor | None:
    """A tensor of a saved checkpoint; None where there is none of that name."""
    file = _keys(folder).get(key)
    if file is None:
        return None
    with safe_open(file, "pt") as opened:
        found: Tensor = opened.get_tensor(key)
    return found


def held_in_common(model: nn.Module, read: Callable[[nn.Parameter], Tensor | None]) -> dict[str, str]:
    """A digest of everything that this rank holds in common with others, by the parameter's name and where the piece starts.

    Args:
        model: a parallel model.
        read: what to look at of a parameter: itself, or its gradient; None for nothing.
    """
    state, found = required_state(model), {}
    for name, parameter in model.named_parameters():
        value = read(parameter)
        if value is None:
            continue
        for label, piece in _common(state, name, value.detach()):
            found[label] = _digest(piece)
    return found


def differing_replicas(everyone: Sequence[Mapping[str, str]]) -> list[str]:
    """The names under which two ranks have other digests, or of which only some ranks that should have one."""
    seen: dict[str, str] = {}
    return sorted({name for rank in everyone for name, value in rank.items() if seen.setdefault(name, value) != value})


def _common(state: ModelState, name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    row = state.plan[name]
    axis = state.axis_of(row)
    cut = row.layout.cut(row.shape)
    if cut is None:
        return [(name, value)]
    pieces = row.layout.pieces(row.shape, axis.get_local_rank(), axis.size())
    return [
        (f"{name} from {piece.full.start}", value.narrow(cut[0], piece.local.start, piece.local.stop - piece.local.start))
        for piece in pieces
        if piece.copies > 1
    ]


def _digest(tensor: Tensor) -> str:
    raw: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8) if tensor.numel() else torch.empty(0)
    return hashlib.blake2b(raw.numpy().tobytes(), digest_size=16).hexdigest()


def _keys(folder: Path) -> dict[str, Path]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file))
    return found
