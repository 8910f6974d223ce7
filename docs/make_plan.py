"""`python docs/make_plan.py`: write docs/plan.md and its picture, from what the commands print."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import shardwise
from shardwise.estimate.picture import to_svg
from shardwise.estimate.show import scenes
from shardwise.subject import find_config

FOLDER = Path(__file__).parent
PICTURE = "plan-layer.svg"
TEXT = """\
# `shardwise plan`: what each rank will hold and send

Nothing is downloaded but the config, and nothing is allocated: the model's own code runs once, as the first rank of a process
group in which nobody else is, on tensors that have a shape and no memory. Every storage and every collective of the step is
followed. This page is written by `docs/make_plan.py` from what the commands print.

{first}

In a terminal with colours the picture below is there too, smaller; `--html plan.html` writes all of it as a page that stands
alone.

![A layer of Mixtral on 4 ranks: matrices cut in the ranks' colours, and the collectives between them]({picture})

Matrices are drawn as in y = x A, to scale: colwise cuts stand, rowwise cuts lie, grey is whole on every rank, a deck are
experts. Dark bars are collectives of forward. A dashed bar lets forward pass, and sums the gradient in backward.

## Several sizes

{sizes}

## Inference

A prefill into a KV cache in place of a training step:

{prefill}

## Options

| | |
|---|---|
| `--batch`, `--sequence` | of a rank's step: 1 x 2048 tokens, or as many as the model has positions for |
| `--dtype` | of the parameters: what the config says |
| `--optimizer` | `adamw` (two states for each parameter, of its dtype), `sgd` (none), `none` (no step) |
| `--inference` | a prefill into a KV cache in place of a training step |
| `--checkpointing` | activation checkpointing, layer by layer |
| `--sequence-parallel` | each rank keeps its slice of the sequence between attention and MLP |
| `--device` | whose attention kernels and optimizer, `cpu` or `cuda`: this machine's; either can be asked for anywhere |
| `--ep` | ranks to which whole experts are dealt |
| `--plan` | `auto`; `infer`: found from what the model computes, and proven; or a JSON file of rules, merged over `auto`'s |

## From Python

```python
found = shardwise.estimate(config, tp_size=8, batch=4, sequence=4096)
found.activations, found.peak, found.peak_in  # bytes, bytes, "backward"
found.kinds  # the kinds of layers; what one of each communicates: kind.collectives
print(found)  # and found.to_html()
```

## How exact it is

For ten types of models the tests run the same step with real memory, and read the most that torch's CPU allocator gave out from
the profiler's records: the estimate has to be within 15 %. The collectives have to be those of a real rank, one by one.

Not seen, and on top: what an allocator rounds up or can't reuse, memory that a kernel takes for itself, the buffers of the
communication library, CUDA's context. A loop that keeps the model's output during backward keeps the logits, too. Attention
masks of padded batches are not made. For CUDA the choice of the attention kernel follows torch's rules, and has not been
measured.

Where a model's code asks for the values of tensors the step can't be simulated: then the command says where, and shows the
table of rules alone. In a process that has a process group already it is refused, because the simulation would need that group.
"""


def main() -> None:
    """Run the commands and write the page."""
    bfloat16 = find_config("mixtral")
    bfloat16.dtype = torch.bfloat16
    found = shardwise.estimate(bfloat16, 4, batch=2, sequence=4096, device="cuda")
    (FOLDER / PICTURE).write_text(to_svg(scenes(found)[0]), encoding="utf-8")
    page = TEXT.format(
        first=shown("shardwise plan mixtral --tp 4 --batch 2 --sequence 4096 --dtype bfloat16 --device cuda"),
        picture=PICTURE,
        sizes=shown("shardwise plan qwen3 --tp 1,2,4,8,64 --dtype bfloat16 --device cuda"),
        prefill=shown("shardwise plan qwen3 --tp 8 --inference --batch 16 --dtype bfloat16 --device cuda", lines=12),
    )
    (FOLDER / "plan.md").write_text(page, encoding="utf-8")


def shown(command: str, lines: int | None = None) -> str:
    """`command` and what it prints, of that the first `lines`. Raises `CalledProcessError` where it fails."""
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "shardwise.cli", *shlex.split(command)[1:]],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=folder,
            env=environment,
        )
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    rest = ["..."] if lines is not None and len(printed) > lines else []
    return "\n".join(["```", f"$ {command}", *printed[:lines], *rest, "```"])


if __name__ == "__main__":
    main()
