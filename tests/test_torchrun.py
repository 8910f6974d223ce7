"""The benchmark of transformers' pull request #43157, unchanged but for the import, as `torchrun` starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models import checkpoint

SCRIPT = """
import os
import sys
import warnings

import torch
from torch.profiler import ProfilerActivity, profile

from shardwise import AutoModelForCausalLM

warnings.simplefilter("error")
model_path, dtype, out = sys.argv[1:]
rank = int(os.environ["RANK"])
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype), tp_plan="auto")
device = model.device
input_ids = torch.randint(3, 127, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
labels = input_ids.clone()

model.train()
for _ in range(3):
    loss = model(input_ids, labels=labels).loss
    loss.backward()
    model.zero_grad()

with profile(activities=[ProfilerActivity.CPU]) as prof:
    loss = model(input_ids, labels=labels).loss
    loss.backward()

finite = all(torch.isfinite(p.grad).all() for p in model.parameters())
calls = sum(event.count for event in prof.key_averages() if event.key == "c10d::allreduce_")
with open(f"{out}/rank{rank}", "w") as file:
    print(device, model.dtype, round(loss.item(), 2), finite, calls, file=file)
"""


# The progress bar, and the profiler's own log.
EXPECTED = r"Loading weights: .*|USDT:.*?profiler_(?:start|stop)"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_benchmark_of_the_pull_request(dtype, tmp_path, tmp_path_factory):
    """Guards: a caller who must start the process group, a model without `device`, a rank that aborts at the end of the script
    ("terminate called without an active exception"), or warns.
    """
    script = tmp_path / "benchmark.py"
    script.write_text(SCRIPT)
    done = torchrun(script, checkpoint(tmp_path_factory, "llama"), dtype, tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.sub(EXPECTED, "", done.stderr).strip() == ""
    first, second = ((tmp_path / f"rank{rank}").read_text().split() for rank in (0, 1))
    assert first == second
    assert first[:2] == ["cpu", f"torch.{dtype}"]
    assert 4.0 < float(first[2]) < 7.0  # log(127) is 4.8
    assert first[3:] == ["True", "10"]  # of two layers four each, of the embedding and of the head one


def torchrun(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Two processes on a port that the system chooses."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=200)
