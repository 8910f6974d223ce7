"""What is to be traced, and where it goes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from shardwise.errors import ShardwiseError, describe
from shardwise.steps import MODES


@dataclass(frozen=True)
class Settings:
    """The options of `shardwise trace`.

    Attributes:
        model: a directory, a hub id, or with `random` a model type.
        tp: ranks.
        plan: "auto", "infer", or rules that are merged over the model's own.
        mode: of `shardwise.steps.MODES`.
        compile: through `torch.compile`.
        check: the ranks are compared before each collective.
        batch, sequence: of the random tokens.
        random, layers: as in `shardwise.subject.find`.
        json, html: files for the first rank's trace; None for none.
        against: a trace that `json` has written before, to compare with.
    """

    model: str
    tp: int = 2
    plan: str | dict[str, str] = "auto"
    mode: str = "training"
    compile: bool = False
    check: bool = False
    batch: int = 1
    sequence: int = 16
    random: bool = False
    layers: int | None = None
    json: str | None = None
    html: str | None = None
    against: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ShardwiseError(describe(f"--mode {self.mode}: there is none of that name.", known=", ".join(MODES)))

    def to_json(self) -> str:
        """For a rank that is started."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """What `to_json` has written."""
        return cls(**json.loads(text))
