"""What is asked of `shardwise generate`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Request:
    """The options of `shardwise generate`.

    Attributes:
        model: a directory, a hub id, or with `random` a model type.
        tp: ranks.
        prompt: the text to continue; None where `ids` are given.
        ids: the tokens to continue, of a model without a tokenizer.
        new_tokens: at most.
        temperature: of sampling; 0 takes the likeliest token each time.
        seed: of the sampling.
        dtype: of the weights; None for the checkpoint's own.
        chat: put the prompt into the tokenizer's chat template, as what the user says.
        random, layers: as in `shardwise.subject.find`.
        plan: "auto", "infer", or rules that are merged over the model's own.
    """

    model: str
    tp: int = 2
    prompt: str | None = None
    ids: tuple[int, ...] = ()
    new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    dtype: str | None = None
    chat: bool = False
    random: bool = False
    layers: int | None = None
    plan: str | dict[str, str] = "auto"

    def to_json(self) -> str:
        """For a rank that is started."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """What `to_json` has written."""
        found = json.loads(text)
        return cls(**found | {"ids": tuple(found["ids"])})
