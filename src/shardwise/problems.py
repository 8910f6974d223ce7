"""What is wrong with a plan, as the person at the terminal reads it: the module, the numbers, the rule, and two ways out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from shardwise.errors import PlanError, describe
from shardwise.heads import Heads
from shardwise.layers import Axis
from shardwise.layout import Shape
from shardwise.plan import wildcard
from shardwise.spec import Rule, ShardSpec


def matches_nothing(rule: Rule, names: Iterable[str]) -> PlanError:
    """A rule of the user's that names nothing in the model; `names` with `*` for numbers."""
    close = get_close_matches(wildcard(rule.pattern), list(names), n=3, cutoff=0.5)
    return PlanError(
        describe(
            f"{rule.pattern!r} matches no module and no parameter.",
            rule=str(rule),
            **({"perhaps": close} if close else {}),
            note="each * stands for exactly one segment of a dotted path",
            either=["name a module or a parameter as model.named_modules() does, or", "take the rule out"],
        )
    )


def refused(name: str, problem: str, rule: Rule) -> PlanError:
    """A style that can't be applied to the module `name`."""
    way_out = ["give it another style, or", f'tp_plan={{"{wildcard(name)}": "replicate"}} to keep it whole']
    return PlanError(describe(f"{name}: {problem}.", rule=str(rule), either=way_out))


def uncuttable(name: str, problem: str, shape: Shape, rule: Rule, sizes: Sequence[int], axis: Axis = "tp") -> PlanError:
    """A parameter whose size the ranks can't share; `sizes`: the smaller numbers of ranks that could."""
    owner = wildcard(name.rpartition(".")[0])
    all_up_to = sizes and sizes[-1] == len(sizes)
    which = f"at most {sizes[-1]}" if all_up_to else ", ".join(map(str, sizes))
    fewer = f"{'an ep' if axis == 'ep' else 'a tp'}_size of {which}, or"
    way_out = [*([fewer] if sizes else []), f'tp_plan={{"{owner}": "replicate"}} to keep it whole']
    return PlanError(describe(f"{name}: {problem}, of shape {shape}.", rule=str(rule), either=way_out))


def mixed_experts(name: str, rule: Rule, wanted: str, found: ShardSpec) -> PlanError:
    """A style of experts, and parameters inside that are cut in another way, or not at all."""
    return PlanError(
        describe(
            f"{name}: the style {rule.style!r} is for experts that are {wanted}, and {found.name} is {found.layout}.",
            rules=[str(rule), str(found.rule) if found.rule else f"none for {found.name}"],
            either=[
                "ep_size=... to deal whole experts, or leave it out to split each, or",
                f'tp_plan={{"{wildcard(name)}": "replicate"}} to keep them whole',
            ],
        )
    )


def cut_differently(first: ShardSpec, other: ShardSpec) -> PlanError:
    """Two names of one tied parameter, under rules that disagree."""
    return PlanError(
        describe(
            f"{first.name} and {other.name} are one tied parameter, and their rules cut it differently.",
            rules=[f"{first.rule}   -> {first.layout}", f"{other.rule}   -> {other.layout}"],
            either=[
                "give both a style that cuts the same dim (embedding_rowwise with colwise_gather_output), or",
                "untie them in the config",
            ],
        )
    )


def torn_apart(name: str, rules: Mapping[str, Rule | None], local: list[str], whole: list[str]) -> PlanError:
    """Attention of which some projections are cut between heads and others are whole."""
    return PlanError(
        describe(
            f"{name}: {', '.join(local)} cut between heads and {', '.join(whole)} whole: heads would read other heads' values.",
            rules=[str(rule) if rule else f"{child}: none" for child, rule in rules.items()],
            either=[
                "give all of them the style colwise (KV heads are shared by ranks where they are too few), or",
                "keep all of them, and the output projection, whole: replicate",
            ],
        )
    )


def heads(name: str, problem: str, rule: Rule, found: Heads, size: int) -> PlanError:
    """Heads that can't be dealt to the ranks."""
    sizes = ", ".join(str(n) for n in found.possible())
    parent = wildcard(name.rpartition(".")[0])
    way_out = [
        f"a tp_size of {sizes}, or",
        f'tp_plan={{"{parent}.<each projection>": "replicate"}} to keep attention whole, or',
        'tp_plan="infer", which computes attention whole, of weights that are cut',
    ]
    return PlanError(describe(f"{name}: {problem}.", rule=str(rule), either=way_out))
