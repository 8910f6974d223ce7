"""What a transformers model is called with, to see what it computes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from shardwise.errors import PlanError, describe
from shardwise.hf.dropout import without_dropout
from shardwise.hf.senses import boxes, sensed

Inputs = Mapping[str, Any]
_TOKENS = 12
_FIRST = 10
_ENCODED = 7
_LARGE = 2**21
_CHARACTERS = 1_000
_LONGER = 4
_ENDINGS = (AttributeError, IndexError, KeyError, NameError, RuntimeError, TypeError, ValueError)
_GLOBAL = "global_attention_mask"
_STATES = ("encoder_hidden_states", "cross_attention_states", "encoder_outputs")
_WIDTHS = ("cross_attention_hidden_size", "encoder_hidden_size", "hidden_size", "d_model", "n_embd")


def sample_feeds(model: PreTrainedModel) -> list[Inputs | Callable[[nn.Module], object]]:
    """Two micro-batches, the second padded on the left and with labels, where it takes them; and, where it generates, a token
    after the others, from the cache.

    A model of texts is given ids, for its encoder and its decoder where it has both; a decoder that attends to an encoder's
    states, in the first micro-batch, those. Of images and sounds it is given noise, as large as its config says.

    Raises `PlanError` for a model that reads something else.
    """
    text = model.config.get_text_config()
    vocabulary = getattr(text, "vocab_size", _CHARACTERS if model.main_input_name == "input_ids" else 0)
    if vocabulary < 2 and model.main_input_name == "input_ids":
        raise _unknown(model)
    generator = torch.Generator().manual_seed(0)
    drawn = [_ids(model, vocabulary, generator) if vocabulary > 1 else None for _ in range(2)]
    batches = [fitting for ids in drawn if (fitting := _first_that_runs(model, _inputs(model, ids, generator)))]
    if not batches:
        raise _unknown(model)
    batches[0] = _with_more(model, batches[0], generator)
    if len(batches) > 1 and _runs(model, padded := _padded(batches[1])):
        batches[1] = padded
    batches[-1] = _with_labels(model, batches[-1])
    feeds: list[Inputs | Callable[[nn.Module], object]] = [*batches]
    if not _has_gradient(model, batches[0]):
        feeds = [in_training(inputs) for inputs in batches]
    caches = (_takes_cache(model), False) if model.can_generate() else ()
    ways = (_from_cache(batches[0], model.config.is_encoder_decoder, given) for given in caches)
    cached = next((way for way in ways if _runs(model, way)), None)
    if cached is not None:
        feeds.append(cached)
    return feeds


def _unknown(model: PreTrainedModel) -> PlanError:
    return PlanError(
        describe(
            f"{type(model).__name__} reads {model.main_input_name}, and what that looks like is not known.",
            either=["shardwise.infer_plan(model, tp_size=..., example_inputs={...})", 'or tp_plan="auto"'],
        )
    )


def _ids(model: PreTrainedModel, vocabulary: int, generator: torch.Generator) -> Tensor:
    """(2, 12) int64, or as many rows as it has codebooks for each of two; the last of each an end, where it knows one."""
    text = model.config.get_text_config()
    rows = 2 * (getattr(text, "num_codebooks", None) or 1)
    ids = torch.randint(min(_FIRST, vocabulary - 1), vocabulary, (rows, _TOKENS), generator=generator)
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and end < vocabulary:
        ids = ids.masked_fill(ids == end, vocabulary - 1 - (end == vocabulary - 1))
        ids[:, -1] = end
    return ids


def _inputs(model: PreTrainedModel, ids: Tensor | None, generator: torch.Generator) -> Iterator[Inputs]:
    """What a model may be called with, the likeliest first."""
    decoder = {"decoder_input_ids": ids.flip(1)} if ids is not None and model.config.is_encoder_decoder else {}
    if model.main_input_name == "input_ids":
        assert ids is not None
        yield {"input_ids": ids} | decoder
        yield {"input_ids": ids[:1]} | {name: given[:1] for name, given in decoder.items()}  # it knows no padding
        yield {"input_ids": ids.view(len(ids), 1, -1).repeat(1, 2, 1)}  # two choices
        if "bbox" in inspect.signature(model.forward).parameters:
            yield {"input_ids": ids, "bbox": boxes(ids)}
        yield {"input_ids": ids.repeat(1, _LONGER)}  # it joins several tokens to one
    for given in _sensed(model, generator) if model.main_input_name == "input_ids" else sensed(model, generator):
        if model.main_input_name != "input_ids":
            yield {**given, **decoder}
        if ids is not None and not decoder:
            yield {"input_ids": ids, **given}


def _sensed(model: PreTrainedModel, generator: torch.Generator) -> Iterator[Inputs]:
    """What may be given beside a text, but for large images."""
    for given in sensed(model, generator):
        if all(value.numel() < _LARGE for value in given.values()):
            yield given


def _with_more(model: PreTrainedModel, inputs: Inputs, generator: torch.Generator) -> Inputs:
    """`inputs` with an encoder's states, global attention, images, sounds or labels, if modules run with them that don't
    without.
    """
    if "input_ids" not in inputs or inputs["input_ids"].dim() != 2:
        return inputs
    ways = [*_with_global_attention(model, inputs)]
    if not model.config.is_encoder_decoder and inputs.keys() <= {"input_ids", "bbox"}:
        more = ({**inputs, **given} for given in _sensed(model, generator))
        ways = [*_with_states(model, inputs, generator), *ways, *_with_each_label(model, inputs), *more]
    return next((given for given in ways if _runs(model, given) and not _run(model, given) <= _run(model, inputs)), inputs)


def _with_states(model: PreTrainedModel, inputs: Inputs, generator: torch.Generator) -> Iterator[Inputs]:
    name = next((name for name in _STATES if name in inspect.signature(model.forward).parameters), None)
    text = model.config.get_text_config()
    widths = dict.fromkeys(width for field in _WIDTHS if isinstance(width := getattr(text, field, None), int))
    for width in widths if name is not None else ():
        states = torch.randn(_rows(model, inputs), _ENCODED, width, generator=generator)
        yield {**inputs, str(name): (states,) if name == "encoder_outputs" else states}


def _with_global_attention(model: PreTrainedModel, inputs: Inputs) -> Iterator[Inputs]:
    """The first token attends to all, and all to it (Longformer)."""
    if _GLOBAL in inspect.signature(model.forward).parameters:
        mask = torch.zeros_like(inputs["input_ids"])
        mask[:, 0] = 1
        yield {**inputs, _GLOBAL: mask}


def _with_labels(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """`inputs` with labels, where a model takes them and gives the same twice: code that computes a loss may read weights."""
    for labelled in _with_each_label(model, inputs):
        if _runs(model, labelled):
            with torch.no_grad():
                first, second = (_loss(model(**labelled)) for _ in range(2))
            return labelled if first is not None and second is not None and torch.equal(first, second) else inputs
    return inputs


def _loss(returned: Any) -> Tensor | None:
    found = returned.get("loss") if isinstance(returned, Mapping) else returned[0]
    return found if isinstance(found, Tensor) else None


def _with_each_label(model: PreTrainedModel, inputs: Inputs) -> Iterator[Inputs]:
    """`inputs` with labels: the tokens themselves, a class for each of them, or one for each row."""
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if tokens is not None and "labels" in inspect.signature(model.forward).parameters:
        rows = torch.zeros(_rows(model, inputs), dtype=torch.long)
        yield from ({**inputs, "labels": labels} for labels in (tokens, torch.zeros_like(tokens), rows))


def _rows(model: PreTrainedModel, inputs: Inputs) -> int:
    return len(inputs["input_ids"]) // (getattr(model.config.get_text_config(), "num_codebooks", None) or 1)


def _run(model: PreTrainedModel, inputs: Inputs) -> set[str]:
    """The modules that run."""
    called: set[str] = set()
    handles = [m.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return called


def _padded(inputs: Inputs) -> Inputs:
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2 or len(ids) < 2:
        return inputs
    mask = torch.ones_like(ids)
    mask[0, : _TOKENS // 4] = 0
    return {**inputs, "attention_mask": mask}


def _first_that_runs(model: PreTrainedModel, ways: Iterator[Inputs]) -> Inputs | None:
    first: Inputs | None = None
    for inputs in ways:
        if _runs(model, inputs):
            return inputs
        first = first or inputs
    return None if model.main_input_name != "input_ids" else first  # whose error is the one to be shown


def _runs(model: PreTrainedModel, feed: Inputs | Callable[[nn.Module], object]) -> bool:
    try:
        with torch.no_grad():
            _ = feed(model) if callable(feed) else model(**feed)
    except _ENDINGS:
        return False
    return True


def _has_gradient(model: PreTrainedModel, inputs: Inputs) -> bool:
    """Whether there is a backward pass in evaluation mode: a reversible model asserts that there is none."""
    try:
        with torch.enable_grad():
            values = [value for value in model(**inputs).values() if isinstance(value, Tensor) and value.requires_grad]
            torch.autograd.backward([value.sum() for value in values])
    except AssertionError:
        return False
    finally:
        model.zero_grad()
    return True


def in_training(inputs: Inputs) -> Callable[[nn.Module], object]:
    """Calls a model with `inputs` as in training, but for dropout. It is left so, for backward."""

    def run(model: nn.Module) -> object:
        without_dropout(model)
        return model.train()(**inputs)

    return run


def _takes_cache(model: PreTrainedModel) -> bool:
    """Whether `generate` hands a cache of keys and values to the model, which else makes one itself."""
    return not model.config.is_encoder_decoder and not model._is_stateful


def _from_cache(inputs: Inputs, is_encoder_decoder: bool, given: bool) -> Callable[[nn.Module], object]:
    """Generates one token more, from a cache that is given, or the model's own."""
    name = "decoder_input_ids" if is_encoder_decoder else "input_ids"
    ids, others = inputs[name], {key: value for key, value in inputs.items() if key != name}

    def run(model: nn.Module) -> object:
        with torch.no_grad():
            kept = {"past_key_values": DynamicCache(config=model.config)} if given else {}
            first = model.eval()(**{name: ids[:, :-1]}, **others, **kept, use_cache=True)
            cache = getattr(first, "past_key_values", None)
            if cache is None:
                return ()
            encoded = {"encoder_outputs": (first.encoder_last_hidden_state,)} if is_encoder_decoder else others
            return model(**{name: ids[:, -1:]}, **encoded, past_key_values=cache, use_cache=True).logits

    return run
