"""Saving through transformers: which tensors a checkpoint has, under which names, and the small files beside them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def checkpoint_tensors(model: PreTrainedModel, tensors: dict[str, Tensor], original_format: bool) -> dict[str, Tensor]:
    """The tensors of the ordinary checkpoint, from the model's full state dict (which may be lazy).

    Tied parameters appear once, under the name that transformers keeps; what the class says to leave out is left out; with
    `original_format` the conversions that loading applied are reverted.
    """
    kept = {name: tensor for name, tensor in tensors.items() if name not in set(model._keys_to_ignore_on_save or ())}
    for target, source in model.all_tied_weights_keys.items():
        if source in kept and kept.get(target) is kept[source]:
            del kept[target]
    seen: dict[int, str] = {}
    unique = {name: tensor for name, tensor in kept.items() if seen.setdefault(id(tensor), name) == name}
    reverted: dict[str, Tensor] = revert_weight_conversion(_AtFullShapes(model, tensors), unique) if original_format else unique
    return reverted


class _AtFullShapes:
    """What conversions ask a model for, whose own parameters are shards: some look at shapes to see what there is to do."""

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
        self._model, self._tensors = model, tensors

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        """The full tensor (which may be lazy)."""
        return self._tensors[name]


def description_files(model: PreTrainedModel) -> Iterator[tuple[str, bytes]]:
    """`config.json`, and `generation_config.json` where the model generates: name and content, as transformers writes them."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            yield path.name, path.read_bytes()
