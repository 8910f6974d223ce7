"""The search for the culprit: both sides run again in float32, every module looked at; the first difference is explained."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardwise.errors import ShardwiseError
from shardwise.model_state import required_state
from shardwise.plan import Plan
from shardwise.spec import ModuleSpec, Rule, ShardSpec
from shardwise.verify.arrange import Arrangements, entered
from shardwise.verify.attempt import Raised, attempt
from shardwise.verify.diagnose import hypotheses, ranked
from shardwise.verify.load import checkpoint, feeds, load_sharded
from shardwise.verify.locate import Difference, difference_at, first_difference, floor_of
from shardwise.verify.measure import forward
from shardwise.verify.one import in_own_process, recorded_by_one
from shardwise.verify.record import Key, Recorded, Recorder, read
from shardwise.verify.result import Culprit, Hypothesis
from shardwise.verify.settings import Settings

_MOST_RULES = 3


@dataclass(frozen=True)
class _Side:
    """What the ranks recorded: on the first rank all of it, elsewhere None."""

    plan: Plan
    ranks: list[Recorded] | None
    raised: Raised | None
    biases: dict[str, torch.Tensor]
    slices: bool


def find_culprit(settings: Settings, number: int) -> Culprit | None:
    """Run micro-batch `number` again, recorded, and explain the first difference; on the first rank. Collective.

    None where nothing differs in this micro-batch alone, in eager code and float32.
    """
    side = _record_ranks(settings, settings.plan, number, "as asked")
    one = _record_one(settings, number, side) if dist.get_rank() == 0 else None
    found = first_difference(one, side.ranks, _places(one, side)) if one is not None and side.ranks is not None else None
    blamed = [_blamed(found, side, one)] if found is not None and one is not None else [""]
    rules = _rules_to_try(settings, side.plan, blamed[0], found) if found is not None else []
    shared: list[Any] = [rules]
    dist.broadcast_object_list(shared, 0)
    trials = [_without(settings, turn, rule, number, one, found, side.plan) for turn, rule in enumerate(shared[0])]
    if one is None:
        return None
    if found is None:
        return _only_raised(side)
    return _explain(found, blamed[0], side, [trial for trial in trials if trial is not None])


def _record_ranks(settings: Settings, plan: Any, number: int, what: str) -> _Side:
    """`what` names the files, which are mapped as long as something is compared with them."""
    gc.collect()
    model = load_sharded(settings, checkpoint(settings), torch.float32, tp_plan=plan)
    state = required_state(model)
    recorder = Recorder(model, entered(state.plan))
    feed = feeds(settings, model)[number]

    def run() -> None:
        with recorder:
            forward(model, model, feed)[1].backward()

    raised = attempt("the search", run)
    recorder.save(_file(settings, f"rank {dist.get_rank()}, {what}"))
    dist.barrier()
    ranks = None
    if dist.get_rank() == 0:
        ranks = [read(_file(settings, f"rank {rank}, {what}")) for rank in range(dist.get_world_size())]
    biases = {n: m.bias.detach() for n, m in model.named_modules() if isinstance(getattr(m, "bias", None), torch.Tensor)}
    return _Side(state.plan, ranks, raised if isinstance(raised, Raised) else None, biases, state.stream is not None)


def _record_one(settings: Settings, number: int, side: _Side) -> Recorded:
    in_own_process(replace(settings, recorded=number, entered=tuple(entered(side.plan))), "recorded")
    return recorded_by_one(settings)


def _places(one: Recorded, side: _Side) -> Arrangements:
    return Arrangements(side.plan, one.events, side.slices)


def _blamed(found: Difference, side: _Side, one: Recorded) -> str:
    """The module to name: of a layer that is given something wrong, the one that left it so."""
    key = found.key
    if key.kind == "gradient of parameter":
        return key.name.rpartition(".")[0]
    if key.kind != "input" or any(h.fits for h in hypotheses(found, side.plan.size)):
        return key.name
    parent = key.name.rpartition(".")[0]
    openers = [name for name in _places(one, side).open_before[key] if name.rpartition(".")[0] == parent]
    return openers[0] if len(openers) == 1 else parent if openers else key.name


def _rules_to_try(settings: Settings, plan: Plan, blamed: str, found: Difference) -> list[str]:
    """The patterns of the user's rules for the module that is blamed, and for its siblings."""
    if not isinstance(settings.plan, dict):
        return []
    names = {blamed, blamed.rpartition(".")[0], found.key.name, found.key.name.rpartition(".")[0]} - {""}
    rows: list[ModuleSpec | ShardSpec] = [*plan.modules, *plan.tensors]
    near = [r for r in rows if r.name in names or r.name.rpartition(".")[0] in names]
    used = [row.rule for row in near if row.rule is not None and row.rule.source == "user"]
    return [key for key, style in settings.plan.items() if any(_is(rule, key, style) for rule in used)][:_MOST_RULES]


def _is(rule: Rule, pattern: str, style: str) -> bool:
    return rule.style == style and (rule.pattern == pattern or rule.pattern.endswith(f".{pattern}"))


def _without(
    settings: Settings, turn: int, pattern: str, number: int, one: Recorded | None, found: Difference | None, plan: Plan
) -> Hypothesis | None:
    """What is left of the difference without one of the user's rules: tried, not computed. Collective."""
    assert isinstance(settings.plan, dict)
    rules = {key: style for key, style in settings.plan.items() if key != pattern}
    name = f"the rule {pattern}: {settings.plan[pattern]}"
    try:
        side = _record_ranks(settings, rules or "auto", number, f"without {turn}")
    except ShardwiseError as error:
        return Hypothesis(name, f"without it there is no plan: {str(error).splitlines()[0]}", float("inf"), False)
    if one is None or found is None or side.ranks is None:
        return None
    again = difference_at(found.key, found.expected, side.ranks, _places(one, side), floor_of(one, found.key))
    remaining = again.error if again is not None else float("inf")
    if again is None and side.raised is None:  # without the rule it is a rank's own affair: what comes next tells
        later = first_difference(one, side.ranks, _places(one, side))
        remaining = later.error if later is not None else 0.0
    cuts = _recut(plan, side.plan)
    if cuts and remaining <= found.bound:
        return Hypothesis("a permuted shard: fused blocks cut straight through", f"{cuts}; measured", remaining, True)
    return Hypothesis(name, "measured without this rule of yours", remaining, remaining <= found.bound)


def _recut(plan: Plan, other: Plan) -> str:
    """How a weight is cut by one plan and by the other, where both cut the same dim otherwise."""
    for row in plan.tensors:
        right = other.get(row.name)
        if right is None or row.layout == right.layout or not (row.sharded and right.sharded):
            continue
        here, there = row.layout.cut(row.shape), right.layout.cut(right.shape)
        if here and there and here[0] == there[0]:
            return f"{row.layout} by your rule, {right.layout} without it"
    return ""


def rule_of(plan: Plan, module: str) -> str:
    """The rule that a module got, with whose it is."""
    rule = next((row.rule for row in plan.modules if row.name == module), None)
    return str(rule) if rule is not None else "no rule: every rank computes it alike"


def _explain(found: Difference, blamed: str, side: _Side, trials: Sequence[Hypothesis]) -> Culprit:
    key = found.key
    bias = side.biases.get(blamed) if key.kind == "output" else None
    made = ranked([*hypotheses(found, side.plan.size, bias), *trials])
    return Culprit(
        module=blamed,
        what=_what(key, blamed),
        phase="backward" if found.backward else "forward",
        style=rule_of(side.plan, blamed),
        error=found.error,
        bound=found.bound,
        shape=tuple(found.expected.shape),
        numbers=_numbers(found),
        hypotheses=tuple(made),
        note=_note(key, blamed, side, found),
        way_on=_way_on(blamed, found),
    )


def _what(key: Key, blamed: str) -> str:
    if key.kind == "gradient of parameter":
        return f"the gradient of its {key.name.rpartition('.')[2]}"
    if key.name != blamed:
        return f"what becomes of its output: the input of {_last(key.name)}"
    words = {"input": "its input", "output": "its output"}
    words |= {"gradient of input": "the gradient of its input", "gradient of output": "the gradient of its output"}
    return words[key.kind] + (f" {key.position + 1}" if key.position else "") + (f" (call {key.call + 1})" if key.call else "")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _numbers(found: Difference) -> tuple[tuple[str, str], ...]:
    wholes = found.arrangement.whole(found.values, found.expected)
    whole = max(wholes, key=found.error_of)
    if whole.shape != found.expected.shape:
        return tuple((f"rank {rank}", f"shape {list(value.shape)}") for rank, value in enumerate(found.values))
    flat = (whole - found.expected).abs().nan_to_num(float("inf")).flatten()
    place = torch.unravel_index(flat.argmax(), found.expected.shape)
    at = str([int(i) for i in place])
    shown = [(f"one process {at}", f"{float(found.expected[place]):.6g}")]
    if len(wholes) == 1:
        return (*shown, ("ranks, put together", f"{float(whole[place]):.6g}"))
    return (*shown, *((f"rank {rank}", f"{float(value[place]):.6g}") for rank, value in enumerate(wholes)))


def _note(key: Key, blamed: str, side: _Side, found: Difference) -> str:
    note = f"By the plan it is {found.arrangement.word}. Everything before it, in the order of execution, is right."
    if key.kind == "input" and key.name != blamed:
        note = (
            f"What {blamed} gives is right, part by part as the plan cuts it; what reaches {_last(key.name)} is not:"
            " what lies between them reads the parts in another way than they are cut."
        )
    if side.raised is not None:
        note += f" The ranks then raise {side.raised.message}."
    return note


def _way_on(blamed: str, found: Difference) -> tuple[str, ...]:
    phase = "backward" if found.backward else "forward"
    return (
        f'shardwise.break_on("{blamed}", phase="{phase}")  # stops at its collectives',
        "with shardwise.trace_collectives() as trace: ...  # writes them down: print(trace)",
    )


def _only_raised(side: _Side) -> Culprit | None:
    if side.raised is None or side.ranks is None:
        return None
    name = side.ranks[0].raised_in or ""
    return Culprit(
        module=name,
        what=f"raises {side.raised.message}",
        phase="forward",
        style=rule_of(side.plan, name),
        error=None,
        bound=0.0,
        note="Everything that could be compared before it is right.",
        way_on=(),
    )


def _file(settings: Settings, who: str) -> Path:
    return Path(settings.folder) / f"recorded by {who}.pt"
