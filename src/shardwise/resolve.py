"""From rules to the table: find what each rule means, check that it can be done, and say so before anything is read or
changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from shardwise import problems
from shardwise.assignment import assigned, own_tensors, summed_experts
from shardwise.heads import Heads, heads_of, reads_other_keys, runs_over_kv
from shardwise.layers import (
    ALIGNED,
    Axis,
    Cut,
    ExpertParallel,
    Local,
    LocalParamsParallel,
    MoeExpertsParallel,
    ParallelStyle,
    Replicate,
    stores_transposed,
)
from shardwise.layers.linear import ColwiseGatherOutput, LinearStyle, RowwiseSplitInput
from shardwise.layers.registry import style_named
from shardwise.layout import Layout, Replicated, Shape
from shardwise.names import join
from shardwise.norms import head_norms
from shardwise.plan import Plan
from shardwise.spec import ModuleSpec, Rule, ShardSpec, sums_gradient


def resolve(model: nn.Module, rules: Sequence[Rule], size: int, ep_size: int | None = None) -> Plan:
    """The plan for `model` (its parameters may be on meta) on `size` ranks; of several rules for one target the last one holds.

    Experts that are dealt lie on `ep_size` ranks, by default on `size`.
    Raises `PlanError` for a rule of the user's that matches nothing, a style that does not exist or can't be applied, and a
    size that can't be cut.
    """
    resolver = _Resolver(model, size, ep_size or size)
    resolver.rules |= assigned(rules, resolver.modules, resolver.tensors, resolver.buffers)
    resolver.rules |= head_norms(resolver.modules, resolver.rules, size)
    resolver.rules |= summed_experts(resolver.modules, resolver.rules)
    rows = tuple(resolver.rows())
    modules = tuple(resolver.module_rows({row.name: row for row in rows}))
    return Plan(size, rows, modules, resolver.ep_size, resolver.rules)


@dataclass
class _Resolver:
    model: nn.Module
    size: int
    ep_size: int
    rules: dict[str, Rule] = field(default_factory=dict)
    asked: dict[tuple[object, ...], dict[str, tuple[int | None, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules(remove_duplicate=False))
        self.tensors: dict[str, torch.Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        self.buffers = dict(self.model.named_buffers(remove_duplicate=False))

    def rows(self) -> Iterator[ShardSpec]:
        """One row a tensor; names that are tied to one tensor share it."""
        names: dict[int, list[str]] = {}
        for name, tensor in (*self.tensors.items(), *self.buffers.items()):
            names.setdefault(id(tensor), []).append(name)
        for tied in names.values():
            rows = [self._row(name) for name in tied]
            said = [row for row in rows if row.rule is not None] or rows[:1]
            if other := next((row for row in said if row.layout != said[0].layout), None):
                raise problems.cut_differently(said[0], other)
            yield replace(said[0], name=tied[0], aliases=tuple(tied[1:]))

    def module_rows(self, rows: dict[str, ShardSpec]) -> Iterator[ModuleSpec]:
        """One row for each module that becomes parallel."""
        by_name = rows | {alias: row for row in rows.values() for alias in row.aliases}
        regions = self._regions()
        for name, module in self.modules.items():
            rule = self.rules.get(name)
            self._check_module(name, module, rule)
            own = {child: by_name[join(name, child)] for child in own_tensors(module)}
            style = style_named(rule.style, str(rule)) if rule else LocalParamsParallel
            self._check_experts(name, style, rule, by_name)
            attributes = self._attributes(name, module, style, own)
            summed = any(sums_gradient(row, self.size, self.ep_size) for row in own.values())
            if rule is None and not attributes and not summed:
                continue
            parent = name.rpartition(".")[0]
            options = style.options(module, self.modules[parent])
            region = regions.get(parent) if style.opens_region or style.closes_region else None
            transposed = stores_transposed(module)
            whole = {key: read_attribute(module, key) for key in attributes}
            yield ModuleSpec(
                name,
                style,
                rule,
                attributes,
                options,
                transposed,
                region is not None,
                bool(region),
                _axis(style, own),
                whole=whole,
            )

    def _row(self, name: str) -> ShardSpec:
        tensor = self.tensors.get(name, self.buffers.get(name))
        assert tensor is not None
        parent = name.rpartition(".")[0]
        rule = self.rules.get(name) or self.rules.get(parent)
        layout: Layout = Replicated()
        partial, shape, axis = False, tuple(tensor.shape), ParallelStyle.axis
        if rule is not None:
            style = style_named(rule.style, str(rule))
            if name not in self.rules and (problem := style.refuses(self.modules[parent])):
                raise problems.refused(parent, problem, rule)
            # A buffer is cut only where a rule names it: beside a module's weights there are tables and counters.
            layout = self._layout(name, style, rule, tensor) if name in self.tensors or name in self.rules else Replicated()
            partial, axis = style.gradient_is_partial and name in self.tensors, style.axis
        return ShardSpec(name, shape, tensor.dtype, layout, partial, name in self.buffers, rule, axis=axis)

    def _check_module(self, name: str, module: nn.Module, rule: Rule | None) -> None:
        if rule is not None and not own_tensors(module) and (problem := style_named(rule.style, str(rule)).refuses(module)):
            raise problems.refused(name, problem, rule)
        if heads_of(module) is None:
            return
        rules = {c: self.rules.get(join(name, c)) for c in _PROJECTIONS if module._modules.get(c) is not None}
        styles = {child: style_named(rule.style, str(rule)) if rule else Replicate for child, rule in rules.items()}
        whole = [child for child, style in styles.items() if issubclass(style, Replicate | ColwiseGatherOutput)]
        local = [child for child, style in styles.items() if _ends_at_heads(style)]
        if whole and local:
            raise problems.torn_apart(name, {child: rules[child] for child in (*local, *whole)}, local, whole)

    def _check_experts(self, name: str, style: type[ParallelStyle], rule: Rule | None, rows: Mapping[str, ShardSpec]) -> None:
        """Experts that are dealt must all be, and outputs are only summed of experts that are split."""
        if rule is None or not issubclass(style, ExpertParallel | MoeExpertsParallel):
            return
        dealt = issubclass(style, ExpertParallel)
        for row in (rows[inside] for inside, _ in self.modules[name].named_parameters(prefix=name)):
            is_dealt, stacked = row.sharded and row.axis == "ep", len(row.shape) > 2
            if len(row.shape) > 1 and (is_dealt is not dealt or (stacked and not row.sharded)):
                raise problems.mixed_experts(name, rule, "dealt" if dealt else "split", row)

    def _layout(self, name: str, style: type[ParallelStyle], rule: Rule, tensor: torch.Tensor) -> Layout:
        shape = tuple(tensor.shape)
        owner = name.rpartition(".")[0]
        transposed = stores_transposed(self.modules[owner]) and name not in self.rules
        target = (owner if name not in self.rules else name).rpartition(".")
        heads = heads_of(self.modules[target[0]])
        plain = style.layout(shape, Cut(transposed=transposed))
        cut = rule.cut
        if cut is None and heads is not None and (where := plain.cut(shape)) is not None and _ends_at_heads(style):
            if problem := heads.problem(self.size):
                raise problems.heads(name if name in self.rules else owner, problem, rule, heads, self.size)
            cut = _head_cut(heads, target[2], shape[where[0]], self.size)
        if cut is None and len(shape) == 3:
            cut = _expert_cut(style, shape, self._ranks(style.axis))
        layout = style.layout(shape, replace(cut, transposed=transposed)) if cut is not None else plain
        ranks = self._ranks(style.axis)
        if problem := layout.problem(shape, ranks):
            fewer = [n for n in range(1, ranks) if layout.problem(shape, n) is None]
            raise problems.uncuttable(name, problem, shape, rule, fewer, style.axis)
        return layout

    def _attributes(
        self, name: str, module: nn.Module, style: type[ParallelStyle], own: dict[str, ShardSpec]
    ) -> dict[str, tuple[int | None, ...]]:
        rule = self.rules.get(name)
        found: dict[str, tuple[int | None, ...]] = dict(rule.attributes) if rule else {}
        for child in module._modules:
            if (below := self.rules.get(join(name, child))) is not None:
                found |= below.parent_attributes
        if rule is not None:
            found = self._local_attributes(module, style, own) | found
        if self._shares_kv_heads(name, module) and hasattr(module, "num_key_value_groups"):
            heads = heads_of(module)
            assert heads is not None
            found.setdefault("num_key_value_groups", (heads.local_group(self.size),) * self.size)
        now = {key: read_attribute(module, key) for key in found}
        return {key: values for key, values in found.items() if any(value != now[key] for value in set(values))}

    def _local_attributes(
        self, module: nn.Module, style: type[ParallelStyle], own: dict[str, ShardSpec]
    ) -> dict[str, tuple[int | None, ...]]:
        """What the style says, one value a rank. It is asked once for modules that are alike: layers times ranks are many."""
        layouts, size = {child: (row.layout, row.shape) for child, row in own.items()}, self._ranks(_axis(style, own))
        numbers = [(key, value) for key, value in vars(module).items() if isinstance(value, int | str | None)]
        alike = (style, type(module), id(vars(module).get("config")), *layouts.items(), *numbers)
        if alike not in self.asked:
            ranks = [style.local_attributes(module, Local(layouts, rank, size)) for rank in range(size)]
            self.asked[alike] = {key: tuple(values[key] for values in ranks) for key in ranks[0]}
        return self.asked[alike]

    def _ranks(self, axis: Axis) -> int:
        return self.ep_size if axis == "ep" else self.size

    def _shares_kv_heads(self, name: str, module: nn.Module) -> bool:
        children = ("q_proj",) if reads_other_keys(module) else ("k_proj", "v_proj")
        rules = [self.rules.get(join(name, child)) for child in children]
        heads = heads_of(module)
        return (
            heads is not None
            and heads.shared(self.size)
            and any(r is not None and _ends_at_heads(style_named(r.style, "")) for r in rules)
        )

    def _regions(self) -> dict[str, bool]:
        """Parents whose children open and close a parallel region that needs care, and whether they drop out elements in it."""
        opens: dict[str, int] = {}
        closes: set[str] = set()
        for name, rule in self.rules.items():
            if name not in self.modules:
                continue
            style, parent = style_named(rule.style, str(rule)), name.rpartition(".")[0]
            if style.opens_region:
                opens[parent] = opens.get(parent, 0) + 1
            if style.closes_region:
                closes.add(parent)
        dropout = {parent: _drops_out(self.modules[parent]) for parent in opens}
        return {p: dropout[p] and p in closes for p, count in opens.items() if p in closes and (count > 1 or dropout[p])}


_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _ends_at_heads(style: type[ParallelStyle]) -> bool:
    # Gathered outputs and split inputs may be cut anywhere: what lies between them and the heads is whole.
    return issubclass(style, LinearStyle) and not issubclass(style, ColwiseGatherOutput | RowwiseSplitInput)


def _head_cut(heads: Heads, child: str, length: int, size: int) -> Cut | None:
    if runs_over_kv(child) and length % heads.kv == 0:
        return heads.kv_cut(length, size)
    return heads.query_cut(length, size) if length % heads.query == 0 else None


def _drops_out(module: nn.Module) -> bool:
    rates = [value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]
    return any(rate > 0 for rate in rates) or any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.children())


def _expert_cut(style: type[ParallelStyle], shape: Shape, size: int) -> Cut | None:
    cut = Cut(unit=ALIGNED)  # not where that leaves a rank nothing
    return cut if style.layout(shape, cut).problem(shape, size) is None else None


def _axis(style: type[ParallelStyle], own: Mapping[str, ShardSpec]) -> Axis:
    return "ep" if style.axis == "ep" or any(row.axis == "ep" for row in own.values()) else "tp"


def read_attribute(module: nn.Module | None, attribute: str) -> Any:
    """The attribute of `module`, or, as "config.name", of its config; None where it has none."""
    value: Any = module
    for part in attribute.split("."):
        value = getattr(value, part, None)
    return value
