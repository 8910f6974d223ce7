"""The model and its inputs, the same for one process and for every rank."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from shardwise import loading
from shardwise.errors import ShardwiseError, describe
from shardwise.hf import build_on_meta, class_of, config_without_dropout, quantization, without_dropout
from shardwise.layers.registry import register_style
from shardwise.mesh import local_device
from shardwise.plan_file import is_plan_file
from shardwise.planning import make_plan
from shardwise.verify.settings import Settings

Feed = Mapping[str, Tensor]
"""What the model is called with, by name."""

_FIRST_ID = 3  # those before are mostly padding, beginning and end


def import_styles(settings: Settings) -> None:
    """Make the parallel styles known that the plan may name. Raises `ShardwiseError` for a module that can't be imported."""
    for name in settings.imports:
        try:
            if name.endswith(".py"):
                _import_file(Path(name))
            else:
                importlib.import_module(name)
        except (ImportError, OSError) as error:
            raise ShardwiseError(
                describe(
                    f"{name} could not be imported: {error}",
                    either=["the name of a module that Python finds, or", "the path of a file that ends in .py"],
                )
            ) from error
    for name, place, kind in settings.styles:
        register_style(name, getattr(importlib.import_module(place), kind))


def load_whole(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The ordinary model, in this process, without dropout, in training mode."""
    config = _config(path)
    if quantization(config) is None:
        model = class_of(config).from_pretrained(path, config=config, dtype=dtype)
    else:
        model = loading.load_dequantized(class_of(config), path, config, dtype)
    return _without_dropout(model.to(local_device(None))).train()


def load_sharded(settings: Settings, path: str, dtype: torch.dtype, **changed: Any) -> PreTrainedModel:
    """This rank's part of it. Collective."""
    config, options = _config(path), {**settings.loading(), **changed}
    rules, ep = options["tp_plan"], options["ep_size"]
    if isinstance(rules, Mapping) or is_plan_file(rules):
        # Wrong rules would be refused; a `Plan` is taken as it is, and what is wrong with it is to be found here.
        options["tp_plan"] = make_plan(build_on_meta(config), settings.tp, rules, ep_size=ep)
    model = loading.from_pretrained(class_of(config), path, config=config, dtype=dtype, **options)
    return _without_dropout(model).train()


def checkpoint(settings: Settings) -> str:
    """The checkpoint that all load: the subject's own, or the one that `write_checkpoint` has made."""
    return settings.subject().path or str(Path(settings.folder) / "model")


def write_checkpoint(settings: Settings) -> None:
    """Make the checkpoint of a subject that has none, once."""
    settings.subject().make(Path(settings.folder) / "model", settings.torch_dtype)


def feeds(settings: Settings, model: PreTrainedModel) -> list[Feed]:
    """The micro-batches, on the model's device: the caller's, or random ids, the second of them padded on the left.

    Raises `ShardwiseError` for a model that takes no ids, where no inputs were given.
    """
    given: list[Feed] = torch.load(settings.inputs) if settings.inputs else _made(settings, model)
    moved: list[Feed] = [{name: tensor.to(model.device) for name, tensor in feed.items()} for feed in given]
    return moved


def _made(settings: Settings, model: PreTrainedModel) -> list[Feed]:
    if model.main_input_name != "input_ids":
        raise ShardwiseError(
            describe(
                f"{type(model).__name__} takes {model.main_input_name}, and only input_ids can be made up.",
                either=["shardwise.verify(..., inputs=[{...}, ...]), a dict of tensors for each micro-batch"],
            )
        )
    text = model.config.get_text_config()
    special = _special_ids(model.config) | _special_ids(text)
    usable = torch.tensor([i for i in range(min(_FIRST_ID, text.vocab_size - 1), text.vocab_size) if i not in special])
    draw = torch.Generator().manual_seed(settings.seed + 7)
    made: list[Feed] = []
    for number in range(settings.micro_batches):
        ids = usable[torch.randint(len(usable), (settings.batch, settings.sequence), generator=draw)]
        mask, labels = torch.ones_like(ids), ids.clone()
        if number == 1:
            padded = settings.sequence // 4
            mask[0, :padded], labels[0, :padded] = 0, -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def _special_ids(config: PreTrainedConfig) -> set[int]:
    named = {name: value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))}
    return {value for value in named.values() if isinstance(value, int)}


def _config(path: str) -> PreTrainedConfig:
    """The checkpoint's config with every dropout at zero: one process and a rank would not drop the same elements."""
    return config_without_dropout(AutoConfig.from_pretrained(path))


def _without_dropout(model: Any) -> Any:
    without_dropout(model)
    return model


def _import_file(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError("there is no such file")
    if path.stem not in sys.modules:
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
