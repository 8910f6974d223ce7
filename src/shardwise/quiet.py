"""Keep progress bars and warnings of transformers and the hub off a screen that shows something else."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import logging as hub
from transformers.utils import logging as transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers, the hub's client and Python's warnings are silent; afterwards they are as before."""
    before, hub_before, bars = transformers.get_verbosity(), hub.get_verbosity(), transformers.is_progress_bar_enabled()
    transformers.set_verbosity_error()
    transformers.disable_progress_bar()
    hub.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.set_verbosity(before)
        hub.set_verbosity(hub_before)
        if bars:
            transformers.enable_progress_bar()
