"""The Python environments of the contenders: made with venv and pip when first needed, and kept under `benchmarks/.envs`."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent / ".envs"
READY = "ready.json"


class NoEnvironment(RuntimeError):
    """An environment could not be made."""


@dataclass(frozen=True)
class Environment:
    """A name and what pip installs behind torch; without packages it is the one that this program runs in."""

    name: str
    packages: tuple[str, ...] = ()

    def python(self, torch: str) -> Path:
        """The interpreter; the environment is made first where it is not there, with what pip calls `torch`.

        Raises `NoEnvironment` with the end of what pip said.
        """
        if not self.packages:
            return Path(sys.executable)
        folder = FOLDER / self.name
        wanted = {"torch": torch, "packages": list(self.packages)}
        ready = folder / READY
        if not ready.exists() or json.loads(ready.read_text()) != wanted:
            print(f"making the environment of {self.name}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(folder)], self.name)
            # First and by itself: a plain `torch`, as the others ask for it, may bring several gigabytes of another build.
            _run(_pip(folder, shlex.split(torch)), self.name)
            _run(_pip(folder, self.packages), self.name)
            ready.write_text(json.dumps(wanted))
        return folder / "bin" / "python"


HERE = Environment("here")
DTENSOR = Environment("transformers-5.23.0", ("transformers==5.23.0", "accelerate~=1.15", "numpy"))
HOOKS = Environment("transformers-5.14.1", ("transformers==5.14.1", "tokenizers<=0.23.0", "accelerate~=1.15", "numpy"))


def installed_torch() -> str:
    """What pip calls the torch of this interpreter."""
    return f"torch=={version('torch').partition('+')[0]}"


def _pip(folder: Path, packages: list[str] | tuple[str, ...]) -> list[str]:
    quiet = ["--quiet", "--disable-pip-version-check"]
    return [str(folder / "bin" / "python"), "-m", "pip", "install", *quiet, *packages]


def _run(command: list[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-4:]
        raise NoEnvironment(f"the environment of {name} could not be made: {shlex.join(command)}\n" + "\n".join(said))
