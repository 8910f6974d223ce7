"""What somebody collects while a model runs."""

from __future__ import annotations

from transformers.utils.output_capturing import _active_collector


def hidden_states_are_recorded() -> bool:
    """Whether the forward that runs collects what its layers give (`output_hidden_states=True`, or so in the config)."""
    collected = _active_collector.get()
    return collected is not None and "hidden_states" in collected
