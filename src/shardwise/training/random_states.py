"""The random states in a Trainer's checkpoint: those of a replica, whose ranks have one in common."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers.trainer_pt_utils import safe_globals, set_rng_state_for_device

_OF_ONE_PROCESS = "rng_state.pth"


def copy_for_one_process(folder: str) -> None:
    """Keep the first rank's state also where a run of one process, on one replica's batches, looks for it."""
    shutil.copyfile(Path(folder, "rng_state_0.pth"), Path(folder, _OF_ONE_PROCESS))


def load_random_state(folder: str, rank: int) -> None:
    """Go on with the state of `rank`, the first one of a replica; of a run that had no such rank, with the first process's.

    Without any, as runs that saved the model alone leave it, nothing is changed. A rank's own file would not do: of a run on
    fewer ranks some have none, and would drop out other elements of the same activations than the rest.
    """
    names = (f"rng_state_{rank}.pth", "rng_state_0.pth", _OF_ONE_PROCESS)
    found = next((path for name in names if (path := Path(folder, name)).is_file()), None)
    if found is None:
        return
    with safe_globals():
        kept = torch.load(found, weights_only=True)
    random.setstate(kept["python"])
    np.random.set_state(kept["numpy"])
    torch.random.set_rng_state(kept["cpu"])
    if torch.cuda.is_available() and "cuda" in kept:
        set_rng_state_for_device("CUDA", torch.cuda, kept, found.name != _OF_ONE_PROCESS)
