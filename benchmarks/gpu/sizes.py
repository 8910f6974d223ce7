"""The shapes: those of Llama-3.2-3B, and tiny ones to try the program on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig


@dataclass(frozen=True)
class Size:
    """A model and what it is fed.

    Args:
        shapes: of the model, as `LlamaConfig` calls them.
        batch: sequences in a training step.
        length: tokens in each, and in the prompt of decoding.
        tokens: that are decoded in a row, at batch 1.
    """

    shapes: dict[str, int]
    batch: int
    length: int
    tokens: int

    def config(self, tp: int = 1) -> LlamaConfig:
        """Of the whole model, or, for tp > 1, of a model whose own shapes are those of one rank."""
        heads = self.shapes["num_attention_heads"]
        shapes = self.shapes | {
            name: self.shapes[name] // tp
            for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
        }
        head_dim = self.shapes["hidden_size"] // heads
        positions = self.length + 2 * self.tokens
        return LlamaConfig(**shapes, head_dim=head_dim, max_position_embeddings=positions, tie_word_embeddings=True)


LLAMA_3B = Size(
    {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    batch=4,
    length=512,
    tokens=32,
)
TINY = Size(
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 512,
    },
    batch=2,
    length=16,
    tokens=4,
)
