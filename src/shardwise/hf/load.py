"""transformers' own loading over lazy tensors: every rename, conversion, cast, tie and initialisation, and nothing read."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from shardwise.hf.checks import Outcome, check
from shardwise.lazy import LazyTensor


def load_lazily(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, LazyTensor],
    *,
    dtype: torch.dtype | str = "auto",
    seed: int | None = None,
    ignore_mismatched_sizes: bool = False,
    strict: bool = True,
    key_mapping: dict[str, str] | None = None,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A `model_class` whose parameters and persistent buffers are lazy, of their full shapes and final dtypes, tied as ever;
    and what transformers says of the keys, as its `output_loading_info` does.

    What isn't in the checkpoint is a plain CPU tensor: non-persistent buffers, and newly initialised parameters. The model is
    in evaluation mode, and `config` is not changed.

    Where `config.architectures` names another class than this one, what lies outside of the base model may differ: keys that
    the model has no place for are left out, parameters that the checkpoint doesn't have are newly initialised, and one warning
    names both. Otherwise, and within the base model, either is an error.

    Args:
        model_class: a concrete class (see `resolve_model_class`).
        config: its config, not quantized (see `without_quantization`).
        tensors: the checkpoint (see `open_checkpoint`).
        dtype: of floating parameters; `"auto"`: what the config or else the checkpoint says.
        seed: of new initialisation, on its own random state; give all ranks the same one. None: torch's current state.
        ignore_mismatched_sizes: initialise parameters of another shape newly, with the same warning.
        strict: with False, allow keys that are missing or left over everywhere, with that warning.
        key_mapping, model_kwargs: as for `from_pretrained`; the latter go to the model's constructor.

    Raises:
        CheckpointError: shapes, keys, conversions or dtypes that don't fit, up to 8 of each.
    """
    with _quiet(), torch.device("cpu"), _random_state(seed):
        try:
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                key_mapping=key_mapping,
                **model_kwargs,
            )
            conversion_errors: dict[str, str] = {}
        except RuntimeError as error:
            model, info, conversion_errors = _after_failure(error)
    # transformers sets these from the path, which it wasn't given
    model.config.name_or_path = model.name_or_path = config.name_or_path
    check(
        Outcome(
            model,
            tensors,
            missing=set(info["missing_keys"]),
            unexpected=set(info["unexpected_keys"]),
            mismatched={name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]},
            conversion_errors=conversion_errors,
        ),
        architectures=list(config.architectures or []),
        allow_mismatched=ignore_mismatched_sizes,
        strict=strict,
        key_mapping=key_mapping,
    )
    return model, info


@contextmanager
def _random_state(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
    else:
        with torch.random.fork_rng(devices=[]):  # everything is initialised on the CPU
            torch.default_generator.manual_seed(seed)
            yield


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of transformers: nothing is loaded yet, and what is wrong is raised by name."""

    def without_bar(_: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        return transformers_logging.EmptyTqdm(*args, **kwargs)

    def without_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    hook = transformers_logging.set_tqdm_hook(without_bar)
    logger.addFilter(without_report)
    try:
        yield
    finally:
        logger.removeFilter(without_report)
        transformers_logging.set_tqdm_hook(hook)


def _after_failure(error: RuntimeError) -> tuple[PreTrainedModel, dict[str, Any], dict[str, str]]:
    """The model and what transformers found, from the call that raised `error` because of a conversion.

    transformers writes the reasons to its log and raises without them, so they are taken from where it raised.
    """
    for names in _locals(error.__traceback__):
        found: Any = names.get("loading_info")
        model = names.get("model")
        if getattr(found, "conversion_errors", None) and isinstance(model, PreTrainedModel):
            return model, found.to_dict(), dict(found.conversion_errors)
    raise error


def _locals(trace: TracebackType | None) -> Iterator[dict[str, Any]]:
    for frame, _ in traceback.walk_tb(trace):
        yield frame.f_locals
