"""Write `docs/verify.md`: runs what it shows, in a folder of its own, and pastes what came out.

python docs/make_verify.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

TEXT = """\
# shardwise verify

Does a model on several ranks compute what one process computes? And if not, where does it begin, and what is wrong there?

`docs/make_verify.py` has run the commands of this page and pasted what they print.

{sound}
First the plan is proven, before any rank starts and any weight is read: all ranks are simulated in this process, forward and
backward, with the layers and collectives that will run. An *island* is what is cut by itself, from the layers that leave
parts of activations to those that put them together; *gradients* is the largest error of one in it. Of a wrong plan it says
which islands are wrong, with the module, the parameter, the figure, and the way out. Of a large model one layer of each kind
is tried, without its large weights. It takes seconds. Where ranks differ later, it says whether that is the plan, or what
ranks alone do.

Then one process of its own runs, and the ranks, on the same weights and inputs, without dropout. Compared are

| | |
|---|---|
| logits, loss | of each micro-batch; one of them is padded on the left |
| gradients | every parameter's, after one, two and three accumulated micro-batches |
| replicas | what several ranks hold in common, weights and gradients: the same bit by bit |
| generated rows | greedy tokens; a row that differs behind two tokens whose logits are equal but for noise does not count |
| saved tensors | what `save_pretrained` writes, by key: the bytes that one process writes |

`MODEL` is a directory, a hub id, or with `--random` a model type (tiny, with random weights). `--layers 2` cuts a huge model
down, `--ep 2` deals experts, `--compile` trains through `torch.compile`, `--plan rules.json` merges rules of yours over the
model's plan, as `tp_plan={{...}}` does, `--import styles.py` registers styles of yours on the ranks. `--html` and `--json`
write the report to files. The exit code is 0 only when everything holds, the proof included. Under torchrun its processes are
the ranks: `torchrun --nproc-per-node 2 -m shardwise.cli verify MODEL`.

In Python it is a call, from a plain process or under torchrun:

```python
result = shardwise.verify("path/to/model", tp_size=2, tp_plan={{"layers.*.mlp.up_proj": "colwise"}})
assert result.passed, result  # prints the report; result.proof, .checks, .blame, .culprit, .to_html(), .to_json()
```

## What is close enough

In float32 the ranks make the same sums in another order: logits may be 1e-4 of the largest apart, the loss 1e-5, and every
gradient 1e-3 of its parameter's largest (a parameter whose gradients are all tiny is measured by a thousandth of the model's
largest). Usual is 1e-6. What is lost or doubled is 1e-2 at least, half a gradient or a whole one.

In bfloat16 and float16 the bounds are multiples of the error that one process has by rounding, to float32 with the same
weights: 2 times for the logits together, 4 times for the loss and for each parameter's gradient.

A router chooses experts by numbers that may be equal but for noise: then a token goes to another expert, and everything
behind it differs. Where only a mixture of experts fails, and by little, look at it in `--dtype float64`.

## A gradient that nobody sums

A rule that forgets that each rank sees its own heads only: the gradient of `q_norm` is a part on every rank.

{norm}
Forward is right, so the search goes through backward, in the order of execution: gradients of each module's outputs and
parameters, and of the inputs of the modules that have a style. The first that differs is named, with what each fault would
predict: *error left* is what remains of the error if that fault is taken back. One is left with noise, and that it is. A rule
of yours nearby is tried, too: the ranks run once more without it.

## A bias that every rank adds

`styles.py` has a row-wise style that makes a mistake of the field:

```python
{styles}```

{bias}
## A fused weight, cut straight through

Phi-3 keeps q, k and v in one matrix. Cut straight through, the first rank has all queries and the second one the rest.

{fused}
What each rank's `qkv_proj` gives is right, as the rule cuts it. It is attention that reads it otherwise, which shows at the
input of `o_proj`. Of how a weight is cut no number tells; but the rule is yours, and without it the model's own plan cuts the
blocks one by one, and nothing is left of the error.

## What it does not see

The search runs in eager code and float32. Where a difference is gone there, the report says so: then it is in compiled code,
or in a lower precision. Between a column-wise and a row-wise layer activations are a rank's own; there the search looks at
what enters and leaves, and names the layer that opened the stretch. What the ranks raise together is a finding like another:
the first module that was given something else than in one process is named. Where one rank alone fails, the command ends with
its message after some seconds.
"""

STYLES = """\
from torch.nn.functional import linear

import shardwise
from shardwise.collectives import reduce_from_tp
from shardwise.layers import RowwiseParallel


class HastyRowwise(RowwiseParallel):
    def forward(self, input):
        return reduce_from_tp(linear(input, self.weight, self._parameters["bias"]), self._tp.mesh)


shardwise.register_style("hasty_rowwise", HastyRowwise)
"""

FILES = {
    "styles.py": STYLES,
    "norm.json": '{"layers.*.self_attn.q_norm": "replicate"}\n',
    "bias.json": '{"layers.*.self_attn.o_proj": "hasty_rowwise"}\n',
    "fused.json": '{"layers.*.self_attn.qkv_proj": "colwise"}\n',
}
COMMANDS = {
    "sound": "shardwise verify qwen3_moe --random --tp 2",
    "norm": "shardwise verify qwen3 --random --tp 2 --plan norm.json",
    "bias": "shardwise verify starcoder2 --random --tp 2 --plan bias.json --import styles.py",
    "fused": "shardwise verify phi3 --random --tp 2 --plan fused.json",
}


def main() -> None:
    """Run everything, and write the page beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in FILES.items():
            (Path(folder) / name).write_text(content)
        shown = {name: show(command, Path(folder)) for name, command in COMMANDS.items()}
    Path(__file__).with_name("verify.md").write_text(TEXT.format(styles=STYLES, **shown), encoding="utf-8")


def show(command: str, folder: Path) -> str:
    """The command, its files, and what it prints, as a block of Markdown."""
    words = command.split()
    done = subprocess.run([sys.executable, "-m", "shardwise.cli", *words[1:]], cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 1) or done.stderr:
        raise SystemExit(f"{command}: {done.stderr}")
    printed = "\n".join(line.rstrip() for line in done.stdout.splitlines())
    files = "".join(f"$ cat {word}\n{FILES[word]}" for word in words if word.endswith(".json"))
    return f"```\n{files}$ {command}\n{printed}\n$ echo $?\n{done.returncode}\n```\n"


if __name__ == "__main__":
    main()
