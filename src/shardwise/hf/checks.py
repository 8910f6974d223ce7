"""Whether what transformers made of a checkpoint is what the model needs; if not, one error with keys, files and shapes."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from shardwise.errors import CheckpointError, describe, first_of
from shardwise.lazy import LazyTensor, sources

Shape = tuple[int, ...]
_SHOWN = 8  # entries of a kind


@dataclass(frozen=True, slots=True)
class Outcome:
    """A model after transformers' loading, and what it reports: names of parameters, in the model's own spelling."""

    model: PreTrainedModel
    tensors: Mapping[str, LazyTensor]
    missing: set[str]
    unexpected: set[str]
    mismatched: dict[str, tuple[Shape, Shape]]  # found, wanted
    conversion_errors: dict[str, str]


def check(
    outcome: Outcome,
    *,
    architectures: list[str],
    allow_mismatched: bool = False,
    strict: bool = True,
    key_mapping: dict[str, str] | None = None,
) -> None:
    """Raise CheckpointError for all that doesn't fit; warn, once, of what `load_lazily` allows."""
    model = outcome.model
    other_class = bool(architectures) and type(model).__name__ not in architectures
    gaps = outcome.missing | outcome.unexpected
    outside = {name for name in gaps if not strict or (other_class and not _within_base(model, name))}
    new = outcome.missing & outside | (set(outcome.mismatched) if allow_mismatched else set())
    dropped = outcome.unexpected & outside
    errors = _Errors(outcome, _checkpoint_keys(outcome, key_mapping))
    problems = {
        "shape": errors.shapes(set(outcome.mismatched) - new),
        "conversion": errors.conversions(),
        "missing": errors.missing(outcome.missing - new),
        "unexpected": errors.unexpected(outcome.unexpected - dropped),
        "dtype": errors.dtypes(),
    }
    found = {kind: first_of(entries, _SHOWN) for kind, entries in problems.items() if entries}
    if found:
        not_there = {"not_there": first_of(lost, _SHOWN)} if (lost := errors.gaps()) else {}
        written_by = {"written_by": ", ".join(architectures)} if other_class else {}
        way_out = ["use the config that belongs to this checkpoint, or"]
        if found.keys() <= {"missing", "unexpected"}:
            way_out.append("strict=False, which initialises what is missing newly, and leaves out what is unexpected, or")
        elif found.keys() <= {"shape"}:
            way_out.append("ignore_mismatched_sizes=True, which initialises these newly, or")
        way_out.append("complete it: save the model again with save_pretrained")
        headline = f"{type(model).__name__}: the checkpoint does not fit the model."
        raise CheckpointError(describe(headline, **found, **not_there, **written_by, either=way_out))
    if new or dropped:
        _warn(model, architectures if other_class else [], new, errors.unexpected(dropped))


def _warn(model: PreTrainedModel, writers: list[str], new: set[str], dropped: list[str]) -> None:
    facts = {"newly_initialised": first_of(sorted(new), _SHOWN), "left_out": first_of(dropped, _SHOWN)}
    what = f"was written by {', '.join(writers)}" if writers else "does not fit the model everywhere, which was allowed"
    headline = f"{type(model).__name__}: the checkpoint {what}."
    warnings.warn(describe(headline, **{kind: names for kind, names in facts.items() if names}), stacklevel=4)


class _Errors:
    """The lines of an error message, a kind a method."""

    def __init__(self, outcome: Outcome, keys: Mapping[str, list[str]]) -> None:
        self.outcome = outcome
        self.keys = keys
        self._related: set[str] = set()

    def shapes(self, names: Iterable[str]) -> list[str]:
        """Parameters of another shape than the checkpoint makes of them."""
        lines = []
        for name in sorted(names):
            found, wanted = self.outcome.mismatched[name]
            lines.append(f"{name}: found {list(found)}, expected {list(wanted)}; from {self._origin(name)}")
        return lines

    def conversions(self) -> list[str]:
        """Parameters that transformers' conversion failed to make."""
        lines = []
        for name, text in sorted(self.outcome.conversion_errors.items()):
            lines += [f"{name}: from {self._origin(name)}", *(f"  {line}" for line in _reason(text))]
        return lines

    def missing(self, names: Iterable[str]) -> list[str]:
        """Parameters that no key of the checkpoint gives."""
        failed = set(self.outcome.conversion_errors)
        return [f"{name}: {list(_get(self.outcome.model, name).shape)}" for name in sorted(set(names) - failed)]

    def unexpected(self, names: Iterable[str]) -> list[str]:
        """Keys that no parameter takes, as the checkpoint calls them."""
        return sorted(self._describe(key) for name in names for key in self.keys.get(name, [name]))

    def dtypes(self) -> list[str]:
        """Floating parameters and buffers that are made of integers, which only a quantizer could read."""
        lines = []
        floating = (tensor for tensor in self.outcome.tensors.values() if tensor.is_floating_point())
        decoded = {id(source) for tensor in floating for source in sources(tensor)}
        for name, tensor in _tensors(self.outcome.model):
            integers = (s for s in sources(tensor) if not (s.dtype.is_floating_point or s.dtype.is_complex))
            wrong = [source for source in integers if id(source) not in decoded]
            if tensor.is_floating_point() and wrong:
                lines.append(f"{name}: expected {_plain(tensor.dtype)}, found {_plain(wrong[0].dtype)} in {wrong[0].name}")
        return lines

    def gaps(self) -> list[str]:
        """Keys that the checkpoint seems to lack: numbers left out of a row that the keys named so far belong to."""
        return sorted(missing_in_rows(self.outcome.tensors, self._related))

    def _origin(self, name: str) -> str:
        keys = self.keys.get(name, [])
        self._related |= set(keys)
        shown = [self._describe(key) for key in keys[:2]] + ([f"{len(keys) - 2} more"] if len(keys) > 2 else [])
        return " + ".join(shown) or "a key that it shares with another parameter"

    def _describe(self, key: str) -> str:
        tensor = self.outcome.tensors.get(key)
        return key if tensor is None else f"{sources(tensor)[0].name} {list(tensor.shape)}"


def missing_in_rows(keys: Iterable[str], related: Iterable[str]) -> set[str]:
    """Keys that would complete the numbered rows of `related` among `keys`, going by the last number in each.

    A row is complete when it has every number up to the highest, and every number that other rows at the same place have:

        experts.0.w1 experts.0.w2 experts.1.w2, related experts.0.w1    ->   experts.1.w1
    """
    rows: dict[tuple[str, str], set[int]] = defaultdict(set)
    places: dict[str, set[int]] = defaultdict(set)
    for key in keys:
        if found := _LAST_NUMBER.fullmatch(key):
            prefix, number, suffix = found.groups()
            rows[prefix, suffix].add(int(number))
            places[_NUMBER.sub("*", prefix)].add(int(number))
    lost = set()
    for key in related:
        if found := _LAST_NUMBER.fullmatch(key):
            prefix, _, suffix = found.groups()
            lost |= {f"{prefix}{number}{suffix}" for number in places[_NUMBER.sub("*", prefix)] - rows[prefix, suffix]}
            lost |= {
                f"{prefix}{n}{suffix}" for n in range(max(rows[prefix, suffix], default=0)) if n not in rows[prefix, suffix]
            }
    return lost


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LAST_NUMBER = re.compile(r"(.*\.)(\d+)(\.(?:(?!\.\d+\.).)*)")


def _checkpoint_keys(outcome: Outcome, key_mapping: dict[str, str] | None) -> dict[str, list[str]]:
    """The keys of the checkpoint that each name of the model is made of, by transformers' own rules.

    Of several parameters that are made of the same keys, only the first has them here.
    """
    model = outcome.model
    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model, key_mapping)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    keys: dict[str, list[str]] = defaultdict(list)
    for key in outcome.tensors:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and key in wanted:
            name = key
        keys[name].append(key)
    return keys


def _within_base(model: PreTrainedModel, name: str) -> bool:
    """Whether a name of the model, or a key that it has no place for, belongs to the base model rather than to a head."""
    prefix = model.base_model_prefix
    base = getattr(model, prefix, None) if prefix else None
    if prefix and name.startswith(f"{prefix}."):
        return True
    inner = base if isinstance(base, nn.Module) else model
    return name.split(".")[0] in {*dict(inner.named_children()), *dict(inner.named_parameters(recurse=False))}


def _get(model: PreTrainedModel, name: str) -> Tensor:
    tensor: Tensor = model.get_parameter_or_buffer(name)
    return tensor


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _reason(text: str) -> list[str]:
    """The message of the exception in transformers' account of it, which is a traceback, the message again, and a summary."""
    lines = [line for line in text.splitlines() if line.strip()]
    start = max((i for i, line in enumerate(lines) if line.startswith(f"{CheckpointError.__module__}.")), default=None)
    if start is None:
        return lines[-2:]
    headline = lines[start].split(": ", 1)[-1]
    stop = next((i for i, line in enumerate(lines[start + 1 :], start + 1) if line == headline), len(lines))
    return [headline, *lines[start + 1 : stop]]


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
