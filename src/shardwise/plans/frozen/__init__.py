"""Plans that were proven once, and kept: a file a type, written by `shardwise freeze`, for all of its sizes.

Of a type that brings no plan that is right, the file is used (`"why"` says why): its rules were inferred. Of any other it is a
record, there to be read and to be compared with: what `auto` makes of the type's own plan and our corrections (`"source"` says
whose a rule is), those of the head included, by their names in the causal LM; a test tells when that is no longer so.

Heads, widths and block counts stand there as expressions (`num_attention_heads units`), whose names are integers of the module,
of a module around it, or of the config; a cut that is not said is the style's own. A file says for which options it was proven.
Of a model with others it says nothing: a plan is inferred, or worked out of the type's own, as if there were no file. So it is
with fewer KV heads than ranks, which neighbouring ranks share.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from torch import nn

from shardwise.plans.frozen.expand import expand_lines, expand_rules, members
from shardwise.plans.frozen.fits import other_option, problem
from shardwise.plans.frozen.record import Frozen, FrozenLine, Variant
from shardwise.spec import Rule

__all__ = [
    "FOLDER",
    "Frozen",
    "FrozenLine",
    "Variant",
    "expand_lines",
    "expand_rules",
    "frozen",
    "frozen_rules",
    "members",
    "other_option",
    "problem",
]

FOLDER = Path(__file__).parent


@cache
def frozen(model_type: str) -> Frozen | None:
    """What is kept of a type; None of one that was never frozen."""
    path = FOLDER / f"{model_type}.json"
    return Frozen.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def frozen_rules(model_type: str, model: nn.Module, prefix: str, size: int) -> list[Rule]:
    """The rules for `model`, the base model of a type, whose names start with `prefix`; none where the type's own plan is as
    good, no file is for its options, or its sizes are not what the file's expressions expect.
    """
    kept = frozen(model_type)
    for variant in kept.variants if kept is not None and kept.why else ():
        if problem(variant, model) is None:
            try:
                return expand_rules(variant, model, prefix, size)
            except ValueError:
                continue
    return []
