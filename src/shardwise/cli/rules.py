"""`--plan FILE`, which several commands have: rules of the user's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from shardwise.errors import ShardwiseError, describe


def read_rules(file: Path | None) -> Literal["auto"] | dict[str, str]:
    """The rules of a JSON file, which are merged over a model's own plan; "auto" without one.

    Raises `ShardwiseError` for a file that is not an object of patterns and styles.
    """
    if file is None:
        return "auto"
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
