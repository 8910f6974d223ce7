"""A plan from a file: its rules are resolved against the model, so an edited file is checked like any other plan."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from shardwise.coverage import check_coverage
from shardwise.errors import PlanError, describe, first_of
from shardwise.hf import check_head
from shardwise.layers import Cut, stores_transposed
from shardwise.layers.registry import style_named
from shardwise.names import Names
from shardwise.notation import cut_dim, read_cut, read_local
from shardwise.plan import Line, Plan, expand
from shardwise.problems import matches_nothing
from shardwise.resolve import read_attribute, resolve
from shardwise.spec import Rule

_NAMED = 4
_WRITTEN = "shardwise.plan(model, tp_size=...).save('plan.json') writes one"


def is_plan_file(given: object) -> bool:
    """Whether a `tp_plan` names a file."""
    return isinstance(given, os.PathLike) or (isinstance(given, str) and given.endswith(".json"))


def load_plan(path: str | os.PathLike[str], model: nn.Module) -> Plan:
    """The plan that `plan.save(path)` wrote, perhaps edited since, for `model` (which may be on meta).

    Raises `PlanError` for a file that is no plan, or one for another model: rules that match nothing, other shapes or numbers
    (the first few are named), and for whatever can't be resolved.
    """
    found = read(path)
    if not isinstance(found, Written):
        raise _no_plan(path, 'it has no "tp" and "rules": a dict of patterns and styles is merged over the model\'s own plan')
    return found.resolved(model)


def read(path: str | os.PathLike[str]) -> Written | dict[str, str]:
    """What lies in a file: a plan, or a dict of patterns and styles. Raises `PlanError` for anything else."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_plan(path, str(error)) from error
    if isinstance(given, dict) and given and all(isinstance(style, str) for style in given.values()):
        return given
    if not isinstance(given, dict) or not isinstance(given.get("tp"), int) or not isinstance(given.get("rules"), list):
        raise _no_plan(path, 'it is not an object with "tp" and "rules"')
    if not isinstance(given.get("ep", 0), int):
        raise _no_plan(path, f'"ep" is {given["ep"]!r}, which is no number of ranks')
    if strange := given.keys() - {"tp", "ep", "rules"}:
        raise _no_plan(path, f"{min(strange)!r} means nothing")
    for number, entry in enumerate(given["rules"], 1):
        if fault := Line.fault(entry):
            raise _no_plan(path, f"rule {number}: {fault}")
    lines = tuple(Line(**entry) for entry in given["rules"])
    return Written(os.fspath(path), given["tp"], given.get("ep") or given["tp"], lines)


def _no_plan(path: object, why: str) -> PlanError:
    return PlanError(
        describe(
            f"{path}: it has to be a JSON object of patterns and styles, or a plan that was saved.",
            why=why,
            either=[_WRITTEN, 'or such as {"layers.*.mlp.up_proj": "colwise"}'],
        )
    )


@dataclass(frozen=True)
class Written:
    """A plan as it lies in a file.

    Args:
        path: of the file.
        size: ranks on the tp axis.
        ep_size: ranks over which experts are dealt.
        lines: its rules.
    """

    path: str
    size: int
    ep_size: int
    lines: tuple[Line, ...]

    def resolved(self, model: nn.Module) -> Plan:
        """The plan for `model`. Raises `PlanError`, see `load_plan`."""
        modules = dict(model.named_modules(remove_duplicate=False))
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
        names = Names((*modules, *shapes))
        wrong: list[str] = []
        rules = []
        for line in self.lines:
            for rule in self._rules(line, modules, shapes):
                hits = names.matching(rule)
                if not hits:
                    raise self._not_for(model, [str(matches_nothing(rule, names.families())).splitlines()[0]])
                wrong += _differences(line, hits, modules, shapes)
                rules.append(rule)
        if wrong:
            raise self._not_for(model, wrong)
        plan = resolve(model, rules, self.size, self.ep_size)
        if self.size > 1:
            check_coverage(model, plan)
            check_head(model, plan)
        return plan

    def _rules(self, line: Line, modules: Mapping[str, nn.Module], shapes: Mapping[str, Any]) -> Iterable[Rule]:
        try:
            patterns = expand(line.pattern)
            attributes, parents = ({k: self._local(v) for k, v in d.items()} for d in (line.attributes, line.parent_attributes))
            cut = read_cut(line.cut, _length(line, patterns[0], modules, shapes)) if line.cut else None
            return [Rule(pattern, line.style, line.source, cut, attributes, parents, line.reason) for pattern in patterns]
        except ValueError as error:
            raise PlanError(f"{self.path}: {line.pattern}: {error}.") from error

    def _local(self, text: str) -> tuple[int, ...]:
        values = read_local(text)[0]
        if len(values) != self.size:
            raise ValueError(f"{text!r} has {len(values)} numbers, and tp={self.size} ranks need one each")
        return values

    def _not_for(self, model: nn.Module, wrong: list[str]) -> PlanError:
        return PlanError(
            describe(
                f"{self.path} is not for this {type(model).__name__}.",
                differs=first_of(wrong, _NAMED),
                either=["the plan of this model and these sizes, or", "take the line out, or mend it"],
            )
        )


def _length(line: Line, pattern: str, modules: Mapping[str, nn.Module], shapes: Mapping[str, Any]) -> int | None:
    """Indices along the dim that the line's style cuts."""
    rule = Rule(pattern, line.style, line.source)
    for name in filter(rule.matches, (*shapes, *modules)):
        shape = shapes.get(name) or shapes.get(f"{name}.weight")
        if shape is not None:
            transposed = name in modules and stores_transposed(modules[name])
            plain = Cut(transposed=transposed, dim=cut_dim(line.cut))
            cut = style_named(line.style, str(rule)).layout(shape, plain).cut(shape)
            return None if cut is None else int(shape[cut[0]])
    return None


def _differences(line: Line, hits: Iterable[str], modules: Mapping[str, nn.Module], shapes: Mapping[str, Any]) -> list[str]:
    """Where the model is not as the line says, in words."""
    found = []
    for name in hits:
        shape = " x ".join(map(str, shapes.get(name) or shapes.get(f"{name}.weight") or ()))
        if line.shape and shape != line.shape:
            found.append(f"{name}: {line.shape} in the file, {shape or 'nothing'} in the model")
        for module, numbers in ((name, line.attributes), (name.rpartition(".")[0], line.parent_attributes)):
            for attribute, text in numbers.items():
                wanted, here = read_local(text)[1], read_attribute(modules.get(module), attribute)
                if wanted != here:
                    found.append(f"{module}.{attribute}: {wanted} in the file, {here} in the model")
    return found
