"""Which rule holds for each module and tensor of a model: of several that name it, the last one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from shardwise import problems
from shardwise.layers import LinearStyle, MoeExpertsParallel, Replicate
from shardwise.layers.registry import style_named
from shardwise.names import Names, join
from shardwise.spec import Rule

_STACKED = 3  # dims of the weights of several experts


def assigned(
    rules: Sequence[Rule], modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> dict[str, Rule]:
    """The rule for each name of a module, parameter or buffer that one of `rules` names.

    Raises `PlanError` for a rule of the user's that matches nothing, and for a style that does not exist.
    """
    assignment = _Assignment(modules, parameters)
    names = Names((*modules, *parameters, *buffers))
    for rule in rules:
        style = style_named(rule.style, str(rule))
        hits = names.matching(rule)
        if not hits and rule.source == "user":
            raise problems.matches_nothing(rule, names.families())
        assignment.give(rule, hits, whole=style is Replicate)
    return assignment.rules


@dataclass
class _Assignment:
    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, Tensor]
    rules: dict[str, Rule] = field(default_factory=dict)

    def give(self, rule: Rule, names: Sequence[str], whole: bool) -> None:
        """Let `rule` hold for these names; one of the user's that keeps modules `whole`, also for what is inside of them."""
        for name in names:
            self.rules[name] = rule
        if rule.source == "user":
            self._give_up(names)
            if whole:
                self._keep_whole(names, rule)

    def _give_up(self, names: Iterable[str]) -> None:
        """Where we keep parameters whole, a rule of the user's for their module holds."""
        for name in names:
            for child in own_tensors(self.modules[name]) if name in self.modules else ():
                kept = self.rules.get(join(name, child))
                if kept is not None and kept.source == "shardwise" and kept.style == "replicate":
                    del self.rules[join(name, child)]

    def _keep_whole(self, names: Iterable[str], rule: Rule) -> None:
        """Whatever is inside of a module that the user keeps whole is whole, but for what the user says of it."""
        places, depth = {name for name in names if name in self.modules}, rule.pattern.count(".") + 1
        inside = [key for key in {**self.rules, **self.parameters} if _outer(key, depth) in places]
        for key in inside:
            if key not in self.rules or self.rules[key].source != "user":
                self.rules[key] = rule
        for key in inside:
            if key in self.modules and self.rules[key] is rule:
                del self.rules[key]


def summed_experts(modules: Mapping[str, nn.Module], rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """Rules for stacked experts whose weights are split by rules, and whose outputs no rule sums."""
    reason = "its experts are split, and no rule says that their outputs are summed"
    found = {}
    for name, module in modules.items():
        stacked = [child for child, p in module._parameters.items() if p is not None and p.dim() == _STACKED]
        own = [rules.get(join(name, child)) for child in stacked]
        styles = [style_named(rule.style, str(rule)) for rule in own if rule is not None]
        split = len(styles) == len(own) > 1 and all(issubclass(s, LinearStyle) and s.axis == "tp" for s in styles)
        if split and name not in rules and MoeExpertsParallel.refuses(module) is None:
            found[name] = Rule(name, "moe_tp_experts", "shardwise", reason=reason)
    return found


def own_tensors(module: nn.Module) -> list[str]:
    """The names of the parameters and buffers that `module` has itself."""
    return [name for group in (module._parameters, module._buffers) for name, value in group.items() if value is not None]


def _outer(name: str, depth: int) -> str | None:
    """The first `depth` segments of a name that has more."""
    parts = name.split(".")
    return ".".join(parts[:depth]) if len(parts) > depth else None
