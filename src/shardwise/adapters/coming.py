"""The adapter that PEFT is about to add, before it has changed anything."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

_CALLERS = ("get_peft_model", "inject_adapter", "add_adapter")
_DEPTH = 12  # frames of torch's and PEFT's own between such a call and its question for the model's layers


def config_being_added() -> tuple[Any, bool]:
    """The config of the adapter that PEFT is adding to the model whose layers it asks for now, None where it is not adding one;
    and whether it is about to make its layers.

    PEFT tells nobody before it is done, so this is taken from the frames of its calls. Where these ever change, what is said
    here is said after the fact (see `whole_as_planned`).
    """
    if "peft" not in sys.modules:
        return None, False
    from peft import PeftConfig

    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            return None, False
        if frame.f_code.co_name in _CALLERS and str(frame.f_globals.get("__name__", "")).startswith("peft."):
            given, injects = frame.f_locals, frame.f_code.co_name == "inject_adapter"
            of_tuner = getattr(given.get("self"), "peft_config", {}) if injects else {}
            found = (given.get("peft_config"), given.get("config"), of_tuner.get(given.get("adapter_name")))
            return next((config for config in found if isinstance(config, PeftConfig)), None), injects
        frame = frame.f_back
    return None, False
