"""What a parallel transformers model does when PEFT adds adapters to it: it refuses what would be wrong, and makes the rest
parallel.
"""

from __future__ import annotations

from typing import Any

import torch

from shardwise.adapters import PREFIXES, PROMPTS, check_config, config_being_added, prefix_layouts, type_of
from shardwise.errors import ShardwiseError
from shardwise.hf import AdaptersSeen, load_adapter
from shardwise.layers import ParallelStyle
from shardwise.model_state import required_state
from shardwise.parallelize import apply_adapters, end_reading, let_weights_be_read
from shardwise.rendezvous import meet


class TakesAdapters(ParallelStyle):
    """Mixed in front of a transformers model."""

    _adapters: AdaptersSeen

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """As ever. PEFT asks for them before it adds an adapter: one that would be wrong is refused here, and nothing has been
        changed. Raises `ShardwiseError` then.
        """
        if not torch.compiler.is_compiling():
            config, makes_layers = config_being_added()
            before, made_layers = self.__dict__.get("_coming", (None, False))
            if config is None:
                self._end_reading()
                self.__dict__.pop("_coming", None)
            elif config is not before or makes_layers != made_layers:
                self._prepare_for(config, makes_layers)
                self.__dict__["_coming"] = config, makes_layers
        return super().named_modules(*args, **kwargs)

    def _prepare_for(self, config: Any, makes_layers: bool) -> None:
        """Refuse the adapter of `config`, or let it have what it needs."""
        state = required_state(self)
        try:
            check_config("default", config, state.plan)
            if state.stream is not None and type_of(config) not in PROMPTS:
                raise ShardwiseError("Adapters and sequence_parallel=True do not go together: leave sequence_parallel out.")
        except ShardwiseError:
            if "peft_config" not in self.__dict__:
                self._hf_peft_config_loaded = False  # which transformers' own add_adapter says beforehand
            raise
        if type_of(config) in PREFIXES:
            self.__dict__["_prefixes"] = prefix_layouts(state.plan)
        if makes_layers and getattr(config, "use_dora", False):
            let_weights_be_read(self)
            self.__dict__["_reads_weights"] = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "_reads_weights" in self.__dict__:  # PEFT raised before it was done
            self._end_reading()
        if "peft_config" in self.__dict__ and not torch.compiler.is_compiling():
            self._settle_adapters()
        return super().__call__(*args, **kwargs)

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configs of the model's adapters, by name.

        PEFT sets it when it has put adapters into the model, which makes them parallel. Collective.
        """
        if "peft_config" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no adapters")
        found: dict[str, Any] = self.__dict__["peft_config"]
        return found

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        self.__dict__["peft_config"] = configs
        self.__dict__["_adapters"] = None
        self._end_reading()
        meet(required_state(self).ep, "adding an adapter")
        self._settle_adapters()

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["peft_config"], self.__dict__["_adapters"]

    def _settle_adapters(self) -> None:
        """Make the adapters parallel that PEFT has added since the last time."""
        seen, configs = self.__dict__["_adapters"], self.__dict__["peft_config"]
        if seen is None or not seen.holds(configs):
            apply_adapters(self, configs)
            self.__dict__["_adapters"] = AdaptersSeen(self, configs)

    def _end_reading(self) -> None:
        if self.__dict__.pop("_reads_weights", False):
            end_reading(self)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `load_adapter`, of an adapter on disk or a state dict of full tensors. Collective."""
        return load_adapter(self, *args, **kwargs)
