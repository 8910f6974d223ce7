"""The README runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
TRAINING = README.parent / "docs" / "training.md"


def block(name: str, page: Path = README) -> str:
    """The page's code block behind the comment `name`."""
    found = re.search(rf"<!-- {name} -->\n```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, name
    return found[1]


def test_the_example_prints_what_the_readme_says(tmp_path: Path) -> None:
    """Guards: an example that no longer runs, or whose output is not what it prints; an abort when the processes end."""
    (tmp_path / "example.py").write_text(block("example"), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "example.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == block("output")
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()


def test_the_example_of_training_trains(tmp_path: Path) -> None:
    """Guards: an example of LoRA and Trainer that no longer runs, under torchrun and through shared memory."""
    (tmp_path / "finetune.py").write_text(block("example", TRAINING), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "finetune.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").exists()


def test_the_example_is_short() -> None:
    """Guards: a first example that nobody reads to its end."""
    assert len([line for line in block("example").splitlines() if line.strip()]) <= 13
