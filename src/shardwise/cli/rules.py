"""`--plan`, which several commands have: which plan it is."""

from __future__ import annotations

from pathlib import Path

from shardwise.errors import ShardwiseError, describe
from shardwise.plan_file import Written, read

HELP = (
    "auto; infer: found from what the model computes, and proven; or a JSON file: a saved plan, or rules, merged over auto's."
)


def read_rules(plan: str) -> str | dict[str, str]:
    """What `--plan` says: "auto", "infer", the path of a saved plan, or the rules of a JSON file, merged over a model's
    own plan.

    Raises `ShardwiseError` for a file that is not there, or is neither.
    """
    if plan in ("auto", "infer"):
        return plan
    file = Path(plan)
    if not file.is_file():
        raise ShardwiseError(describe(f"--plan {plan}: there is no such file.", either=["auto, infer, or", "a JSON file"]))
    found = read(file)
    return str(file.resolve()) if isinstance(found, Written) else found
