"""What is verified, and how: the arguments of `shardwise.verify`, in a form that every process gets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shardwise.errors import ShardwiseError, describe
from shardwise.subject import Subject, find

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass(frozen=True)
class Settings:
    """The arguments of `shardwise.verify`.

    Args:
        model, random, layers: what `shardwise.subject.find` takes.
        tp, ep: ranks on the tp axis, and those to which experts are dealt; None to split every expert.
        plan: `"auto"`, `"infer"`, or rules that are merged over the model's own plan.
        dtype: name of the dtype of weights and activations.
        compiled: the ranks run compiled code in training.
        sequence_parallel, overlap: as in `from_pretrained`.
        batch, sequence, micro_batches, new_tokens, seed: of the inputs, where none are given.
        inputs: file with the micro-batches that the caller gave; None to make them.
        imports: modules, or files, that register styles: imported by every process first.
        styles: name, module and class of parallel styles to register.
        recorded, entered: for the search: which micro-batch is recorded, and the modules whose inputs are.
        folder: where the processes leave what they find for each other.
        timeout: seconds.
    """

    model: str
    random: bool = False
    layers: int | None = None
    tp: int = 2
    ep: int | None = None
    plan: str | dict[str, str] = "auto"
    dtype: str = "float32"
    compiled: bool = False
    sequence_parallel: bool = False
    overlap: bool = False
    batch: int = 2
    sequence: int = 12
    micro_batches: int = 3
    new_tokens: int = 8
    seed: int = 0
    inputs: str | None = None
    imports: tuple[str, ...] = ()
    styles: tuple[tuple[str, str, str], ...] = ()
    recorded: int = 0
    entered: tuple[str, ...] = ()
    folder: str = ""
    timeout: float = 900.0

    @property
    def world(self) -> int:
        """Ranks in all."""
        return max(self.tp, self.ep or 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return DTYPES[self.dtype]

    def check_dtype(self) -> None:
        """Raise `ShardwiseError` for a dtype that there is not, or in which nothing can be verified."""
        if self.dtype not in DTYPES:
            raise ShardwiseError(describe(f"dtype={self.dtype}: verified can be these.", known=", ".join(DTYPES)))

    def subject(self) -> Subject:
        """What `model` names. Raises `ShardwiseError` where there is no such model."""
        return find(self.model, random=self.random, layers=self.layers)

    def loading(self) -> dict[str, Any]:
        """The keywords of `from_pretrained` on a rank."""
        extra = {name: True for name in ("sequence_parallel", "overlap") if getattr(self, name)}
        return {"tp_plan": self.plan, "tp_size": self.tp, "ep_size": self.ep, **extra}

    def to_json(self) -> str:
        """For handing the settings to another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that `to_json` made `text` of."""
        values = json.loads(text)
        styles = tuple((name, module, kind) for name, module, kind in values["styles"])
        lists = {name: tuple(values[name]) for name in ("imports", "entered")}
        return cls(**{**values, **lists, "styles": styles})
