"""docs/profile.md and its pictures: the commands that it shows are run, and what they print is what stands there.

python docs/make_profile.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shardwise.profiling import plots
from shardwise.profiling.result import Comparison
from shardwise.profiling.settings import Settings

PAGE = Path(__file__).parent / "profile.md"
TEMPLATE = Path(__file__).parent / "profile.template.md"
PICTURES = Path(__file__).parent / "profile"
WIDTH = 110
COMMAND = "shardwise profile llama --random --compile --against dtensor,transformers --sequence 64"
DECODE = "shardwise profile llama --random --mode decode --batch 1 --sequence 64 --steps 20 --output decode"


def main() -> None:
    """Run everything and write the page."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        said = {"COMMAND": run(COMMAND, folder), "DECODE": run(DECODE, folder)}
        text = TEMPLATE.read_text(encoding="utf-8")
        for name, shown in said.items():
            command = {"COMMAND": COMMAND, "DECODE": DECODE}[name]
            text = text.replace(f"<!-- {name} -->", f"```\n$ {command}\n{shown}\n```")
        draw(folder / "profile-output")
    PAGE.write_text(text, encoding="utf-8")


def run(command: str, folder: Path) -> str:
    """What a command prints, as a user in `folder` sees it."""
    program = [sys.executable, "-m", "shardwise.cli", *command.split()[1:]]
    done = subprocess.run(
        program, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": str(WIDTH)}
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip()


def draw(output: Path) -> None:
    """The pictures of the page that the command has written."""
    settings = json.loads((output / "report.json").read_text(encoding="utf-8"))["settings"]
    result = Comparison.read(Settings.from_json(json.dumps(settings | {"output": str(output)})))
    PICTURES.mkdir(exist_ok=True)
    for name, picture in (
        ("steps", plots.step_bars(result)),
        ("breakdown", plots.breakdown_bars(result)),
        ("timeline", plots.timeline(result.profiles[0])),
    ):
        (PICTURES / f"{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
