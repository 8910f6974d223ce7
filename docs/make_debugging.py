"""docs/debugging.md, docs/trace.md and docs/infer.md: what their commands print is what stands there.

python docs/make_debugging.py [debugging | trace | infer]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
COMMANDS = "p weight.grad.norm()\nc\np weight.grad.norm()\nc\n"
WIDTH = 110
# What torchrun and torch say of themselves, and where things lie on the machine that ran it.
NOISE = re.compile(r"^(W\d{4} |\*{5}|\[rank[1-9]\]|--Return--|.*RemovedIn|\s*$)")
MARK = re.compile(r"^<!-- (FILE|RUN!?|PDB|FAIL) (.+) -->$", re.MULTILINE)


def main() -> None:
    """Write the pages."""
    for page in sys.argv[1:] or ("debugging", "trace", "infer"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = shutil.copytree(DOCS / ("infer" if page == "infer" else "debugging"), Path(scratch) / "files")
            template = (DOCS / f"{page}.template.md").read_text(encoding="utf-8")
            text = MARK.sub(lambda mark, folder=folder: shown(folder, *mark.groups()), template)  # type: ignore[misc]
        (DOCS / f"{page}.md").write_text(text, encoding="utf-8")


def shown(folder: Path, kind: str, what: str) -> str:
    """The block that stands for a mark."""
    if kind == "FILE":
        return f"```python\n{(folder / Path(what).name).read_text(encoding='utf-8').strip()}\n```"
    output = run(folder, what, fails=kind in ("RUN!", "FAIL"), typed=COMMANDS if kind == "PDB" else "")
    if kind == "PDB":
        output = debugged(output)
    if kind == "FAIL":
        output = error_of(output)  # without what led to it
    return f"```\n$ {what}\n{output}\n```"


def run(folder: Path, command: str, fails: bool, typed: str) -> str:
    """What a user in the folder sees. Raises `SystemExit` where it fails and should not, or the other way round."""
    environment = os.environ | {"COLUMNS": str(WIDTH), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    line = re.sub("^shardwise ", f"{sys.executable} -m shardwise.cli ", command)
    line = line.replace("torchrun", "torchrun --standalone")
    done = subprocess.run(
        line, shell=True, cwd=folder, env=environment, input=typed, capture_output=True, text=True, check=False
    )
    if bool(done.returncode) != fails:
        raise SystemExit(f"{command}\n{done.stdout}\n{done.stderr}")
    said = done.stdout + (done.stderr if command.startswith(("torchrun", "python")) else "")
    lines = [line.rstrip() for line in said.splitlines() if not NOISE.match(line) or "torchrun" not in command]
    return "\n".join(lines).strip("\n").replace(f"{folder}{os.sep}", "")


def debugged(output: str) -> str:
    """A session of pdb, with what was typed, which a terminal would show."""
    typed = iter(COMMANDS.splitlines())
    lines = re.sub(r"\(Pdb\) ", lambda prompt: f"(Pdb) {next(typed, '')}\n", output).splitlines()
    return "\n".join(line for number, line in enumerate(lines) if number == 0 or line != lines[number - 2])


def error_of(output: str) -> str:
    """The error, of torchrun's ranks that of the first, without the traceback and torchrun's account of it."""
    said = output.splitlines()
    lines = [line.removeprefix("[rank0]: ") for line in said if line.startswith("[rank0]: ")] or said
    first = next(number for number, line in enumerate(lines) if line.startswith("shardwise."))
    return "\n".join(lines[first:])


if __name__ == "__main__":
    main()
