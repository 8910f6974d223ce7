"""What the user chose for the demo, and the two sizes that it comes in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import LlamaConfig, PreTrainedConfig

BYTES = 256
"""The vocabulary: a token is a byte."""


@dataclass(frozen=True)
class Size:
    """A model and how it is trained.

    Args:
        hidden, intermediate, layers: of the Llama, which has 8 heads and 4 KV heads.
        batch, length: sequences in a step, and tokens in each.
        steps, warmup: optimizer steps, and how many of them the learning rate takes to reach its peak.
        learning_rate: the peak. A higher one learns no more in so few steps, and makes training chaotic: at 2e-3, two runs in
            one process that differ by float32 noise are 2e-2 apart in loss after 50 steps; at 6e-4, 2e-5 after 160.
        new_tokens: to generate at the end.
        loss_fall: nats per byte by which training must lower the loss, or the comparison would be about nothing.
    """

    hidden: int
    intermediate: int
    layers: int
    batch: int
    length: int
    steps: int
    warmup: int
    learning_rate: float
    new_tokens: int
    loss_fall: float


FULL = Size(384, 896, 4, batch=8, length=64, steps=160, warmup=10, learning_rate=6e-4, new_tokens=96, loss_fall=1.0)
FAST = Size(64, 160, 2, batch=4, length=64, steps=20, warmup=5, learning_rate=4e-3, new_tokens=16, loss_fall=0.5)


@dataclass(frozen=True)
class Settings:
    """The options of `shardwise demo`.

    Args:
        tp: ranks.
        steps: optimizer steps; None for the size's own number.
        output: the folder that is written to.
        seed: of the weights and of the order of the batches.
        text: a file or folder; None for the standard library's sources.
        fast: the small size.
    """

    tp: int = 2
    steps: int | None = None
    output: Path = Path("demo-output")
    seed: int = 0
    text: Path | None = None
    fast: bool = False

    @property
    def size(self) -> Size:
        """The size to run."""
        return FAST if self.fast else FULL

    @property
    def total_steps(self) -> int:
        """Optimizer steps to make."""
        return self.steps if self.steps is not None else self.size.steps

    @property
    def reload_tp(self) -> int:
        """The other number of ranks, at which the saved checkpoint is opened again."""
        return 4 if self.tp == 2 else 2

    @property
    def work(self) -> Path:
        """For files that are gone when the demo ends."""
        return self.output / "work"

    @property
    def checkpoint(self) -> Path:
        """Where the trained model is saved."""
        return self.output / "checkpoint"

    def to_json(self) -> str:
        """For handing the settings to a worker."""
        return json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()})

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that `to_json` made `text` of."""
        values = json.loads(text)
        paths = {name: Path(values[name]) for name in ("output", "text") if values[name] is not None}
        return cls(**{**values, **paths})


def model_config(size: Size) -> PreTrainedConfig:
    """A byte-level Llama with grouped-query attention, in float32."""
    return LlamaConfig(
        vocab_size=BYTES,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        dtype="float32",
    )
