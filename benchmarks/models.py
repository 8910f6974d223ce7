"""The models, as transformers calls their sizes, and their checkpoints, made by `python -m benchmarks.models`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.process import ROOT


@dataclass(frozen=True)
class Model:
    """A model type and its sizes; `name` is that of its checkpoint's folder."""

    name: str
    kind: str
    sizes: dict[str, int]
    dtype: str = "float32"


def llama(name: str, layers: int, width: int, inner: int, heads: int, vocabulary: int, dtype: str = "float32") -> Model:
    """A Llama with as many KV heads as heads."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner, "vocab_size": vocabulary}
    return Model(name, "llama", sizes | {"num_attention_heads": heads, "num_key_value_heads": heads}, dtype)


def write_checkpoints(models: list[Model], folder: Path) -> None:
    """A folder for each in `folder`, by a process that does it and ends. Raises where that fails."""
    todo = {model.name: model for model in models if not (folder / model.name).exists()}
    if todo:
        table = json.dumps([vars(model) for model in todo.values()])
        subprocess.run([sys.executable, "-m", "benchmarks.models", str(folder), table], cwd=ROOT, check=True)


def main(folder: Path, table: list[dict[str, object]]) -> None:
    """Build and save each; with a seed, so that every run has the same weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    for entry in table:
        torch.manual_seed(0)
        config = AutoConfig.for_model(entry["kind"], **entry["sizes"], tie_word_embeddings=False)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, str(entry["dtype"])))
        model.save_pretrained(folder / str(entry["name"]), max_shard_size="100GB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
