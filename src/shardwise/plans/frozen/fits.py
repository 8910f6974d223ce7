"""Whether a frozen plan is for a model: its options, its modules and its matrices are those that the plan was proven with."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from shardwise.plan import wildcard
from shardwise.plans.frozen.record import NUMBER, Variant
from shardwise.plans.frozen.scope import field

_NO_OPTION = re.compile(
    "dtype|^_|name_or_path|version|token_id|^output_|^return_dict|use_cache|problem_type|label|dropout|drop_|initial|"
    "activation|_act$|_act_fn|afn|^tie_|architectures|^model_type|^summary_|gradient|pruned|finetuning|attn_implementation|"
    "rope_theta|rope_scaling|rope_parameters|max_|vocab|^prefix$|langs|forced_|begin_|suppress|tokenizer|_eps|epsilon|"
    "scale_embedding|normalize_before|classifier"
)
"""Fields that say nothing about where heads and channels lie: rates, tokens, names, activations."""
_HEADS = ("num_attention_heads", "num_key_value_heads")


def options(config: Any, also: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """The options of a config as JSON: flags, words, which of its fields are None, the kinds of its layers (one each), and
    whether queries share KV heads; and the fields `also`, which are none as a rule.
    """
    for name, value in sorted(vars(config).items()):
        if _NO_OPTION.search(name) and name not in also:
            continue
        if isinstance(value, bool | str | None):
            yield name, json.dumps(value)
        elif isinstance(value, int | float):
            yield name, NUMBER
        elif isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            yield from ((name, json.dumps(one)) for one in sorted(set(value)))
    query, kv = (field(config, name) for name in _HEADS)
    if isinstance(query, int) and isinstance(kv, int):
        yield "heads", json.dumps("one KV head" if kv == 1 else "a KV head each" if kv == query else "groups")


def matrices(model: nn.Module) -> list[str]:
    """The families of parameters of several dims."""
    return list(dict.fromkeys(wildcard(name) for name, p in model.named_parameters() if p.dim() > 1))


def classes(model: nn.Module, patterns: Sequence[str]) -> dict[str, list[str]]:
    """The classes of the modules of some families, where there are any."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        kinds = found.setdefault(wildcard(name), [])
        if (kind := type(module).__name__) not in kinds:
            kinds.append(kind)
    return {pattern: sorted(found[pattern]) for pattern in patterns if pattern in found}


def other_option(variant: Variant, config: Any) -> str | None:
    """Which option of `config` is another one than `variant` is for, in words; None where none is."""
    for name, value in options(config, variant.options):
        if name in variant.options and value not in variant.options[name]:
            return f"{name} is {value}, and the frozen plan was proven with {' and '.join(variant.options[name])}"
    return None


def problem(variant: Variant, model: nn.Module) -> str | None:
    """What of `model`, a base model, was not there when `variant` was proven, in words; None where all was."""
    if (other := other_option(variant, model.config)) is not None:
        return other
    for name, kinds in classes(model, list(variant.modules)).items():
        if not set(kinds) <= set(variant.modules[name]):
            return f"{name} is a {', '.join(kinds)}, and the frozen plan was proven with {', '.join(variant.modules[name])}"
    unknown = [name for name in matrices(model) if "*" in name and name not in variant.matrices]
    return f"{unknown[0]} was not there" if unknown else None
