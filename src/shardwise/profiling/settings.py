"""What is to be profiled: the model, who runs it, and on what input."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from shardwise.errors import ShardwiseError, describe
from shardwise.steps import MODES

OURS, DTENSOR, TRANSFORMERS = "shardwise", "dtensor", "transformers"
PEERS = (DTENSOR, TRANSFORMERS)
EAGER, COMPILED = "eager", "compiled"


@dataclass(frozen=True)
class Cell:
    """One way to run the model: who makes it parallel, and whether it is compiled. Prints as "shardwise eager"."""

    contender: str
    how: str

    @property
    def key(self) -> str:
        """For names of files."""
        return f"{self.contender}-{self.how}"

    def __str__(self) -> str:
        return f"{self.contender} {self.how}"


@dataclass(frozen=True)
class Settings:
    """The options of `shardwise profile`.

    Attributes:
        model: as it was named.
        path: folder or hub id of the checkpoint that every contender loads.
        output: the folder that is written to.
        tp: ranks.
        compile: also with `torch.compile`, besides eager.
        against: the peers, of `PEERS`.
        mode: of `MODES`: forward and backward; forward alone, without gradient; one token behind a cache of `sequence`.
        dtype: of the weights, as "bfloat16".
        batch, sequence: of the input.
        warmup: steps before anything counts.
        steps: that are timed, without the profiler.
        stacks: whether the trace has Python's frames, which slows the profiled step.
    """

    model: str
    path: str
    output: Path
    tp: int = 2
    compile: bool = False
    against: tuple[str, ...] = ()
    mode: str = "training"
    dtype: str = "float32"
    batch: int = 4
    sequence: int = 512
    warmup: int = 3
    steps: int = 5
    stacks: bool = False

    def __post_init__(self) -> None:
        for name in self.against:
            if name not in PEERS:
                raise ShardwiseError(describe(f"--against {name}: there is none of that name.", known=", ".join(PEERS)))
        if self.mode not in MODES:
            raise ShardwiseError(describe(f"--mode {self.mode}: there is none of that name.", known=", ".join(MODES)))

    @property
    def cells(self) -> list[Cell]:
        """All that is run, ours first."""
        hows = (EAGER, COMPILED) if self.compile else (EAGER,)
        return [Cell(contender, how) for contender in (OURS, *self.against) for how in hows]

    @property
    def tokens(self) -> int:
        """That a step goes over."""
        return self.batch * (1 if self.mode == "decode" else self.sequence)

    def folder(self, cell: Cell) -> Path:
        """Where each rank's trace of `cell` lies."""
        return self.output / "ranks" / cell.key

    def to_json(self) -> str:
        """For handing the settings to a rank."""
        return json.dumps(asdict(self) | {"output": str(self.output)})

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that `to_json` made `text` of."""
        values = json.loads(text)
        return cls(**values | {"output": Path(values["output"]), "against": tuple(values["against"])})
