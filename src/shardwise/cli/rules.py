"""`--plan`, which several commands have: which plan it is."""

from __future__ import annotations

import json
from pathlib import Path

from shardwise.errors import ShardwiseError, describe

HELP = "auto; infer: found from what the model computes, and proven; or a JSON file: pattern to style, merged over auto's."


def read_rules(plan: str) -> str | dict[str, str]:
    """What `--plan` says: "auto", "infer", or the rules of a JSON file, which are merged over a model's own plan.

    Raises `ShardwiseError` for a file that is not there, or is no object of patterns and styles.
    """
    if plan in ("auto", "infer"):
        return plan
    file = Path(plan)
    if not file.is_file():
        raise ShardwiseError(describe(f"--plan {plan}: there is no such file.", either=["auto, infer, or", "a JSON file"]))
    why = "it is something else"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        found, why = None, str(error)
    if isinstance(found, dict) and all(isinstance(style, str) for style in found.values()):
        return found
    raise ShardwiseError(
        describe(
            f"--plan {file}: it has to be a JSON object of patterns and styles.",
            why=why,
            either=['such as {"layers.*.self_attn.o_proj": "rowwise"}'],
        )
    )
