"""What a wrapper has around its text model: vision and audio towers, what joins them to it. Every rank computes it whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from shardwise.plan import wildcard
from shardwise.spec import Rule

_End = TypeVar("_End", bound=nn.Module)


def text_prefix(model: PreTrainedModel) -> str | None:
    """The path of the text model inside a wrapper ("model.language_model." of a LlavaForConditionalGeneration); None where
    `model` is no wrapper.

    The text model is the innermost one around the token embedding; a wrapper has a config of its own around the text model's.
    """
    around = around_text(model)
    if not around or around[-1].config is model.config:
        return None
    return next(f"{name}." for name, part in _models(model) if part is around[-1])


def around_text(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models inside `model`, itself among them, that have the token embedding inside: the outermost first."""
    embedding = token_embedding(model)
    return [part for _, part in _models(model) if any(found is embedding for found in part.modules())]


def token_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """The embedding of the tokens; of a model that does not know its own, that of the first model inside with a vocabulary."""
    own = end_of(model, "get_input_embeddings", nn.Embedding)
    return own or next((found for _, part in _models(model) if (found := _vocabulary(part)) is not None), None)


def end_of(model: PreTrainedModel, method: str, kind: type[_End]) -> _End | None:
    """What `get_input_embeddings` or `get_output_embeddings` gives; None where it is no `kind`, or the model has none."""
    try:
        end = getattr(model, method)()
    except (NotImplementedError, AttributeError):
        return None
    return end if isinstance(end, kind) else None


def tower_rules(model: PreTrainedModel, rules: Sequence[Rule]) -> list[Rule]:
    """Rules that keep whole what lies outside of the text model of a wrapper and none of `rules` names.

    None for a model that is no wrapper, or whose text model has no plan among `rules`: there nothing may stay whole unsaid.
    Another model with a vocabulary inside (a talker) is no tower, and needs rules of its own.
    """
    prefix = text_prefix(model)
    if prefix is None or not _is_planned(model, prefix, rules):
        return []
    text = model.get_submodule(prefix[:-1])
    inside = {id(parameter) for parameter in text.parameters()}
    speaking = tuple(f"{name}." for name, part in _beside(model, prefix) if _vocabulary(part) is not None)
    families: dict[str, list[str]] = {}
    named: set[str] = set()
    for name, parameter in model.named_parameters():
        if any(rule.matches(name) or rule.matches(name.rpartition(".")[0]) for rule in rules):
            named.add(wildcard(name))
        elif id(parameter) not in inside and not name.startswith(speaking):
            families.setdefault(wildcard(name), []).append(name)
    return [
        Rule(pattern, "replicate", "shardwise", reason=f"{_what(model, prefix, names[0])}, computed whole by every rank")
        for family, names in families.items()
        for pattern in (names if family in named else [family])
    ]


def _models(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    return ((name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel))


def _beside(model: PreTrainedModel, prefix: str) -> Iterator[tuple[str, PreTrainedModel]]:
    """The models inside that do not have the text model inside, outermost first."""
    return ((name, part) for name, part in _models(model) if name and not prefix.startswith(f"{name}."))


def _vocabulary(model: PreTrainedModel) -> nn.Embedding | None:
    end = end_of(model, "get_input_embeddings", nn.Embedding)
    return end if end is not None and end.num_embeddings == getattr(model.config, "vocab_size", None) else None


def _is_planned(model: PreTrainedModel, prefix: str, rules: Sequence[Rule]) -> bool:
    inside = [(prefix + name, part) for name, part in model.get_submodule(prefix[:-1]).named_modules()]
    return any(rule.matches(name) for rule in rules for name, part in inside if not isinstance(part, nn.Embedding))


def _what(model: PreTrainedModel, prefix: str, name: str) -> str:
    path, tower = next(((path, part) for path, part in _beside(model, prefix) if name.startswith(f"{path}.")), ("", None))
    if tower is None:
        return "what joins the towers to the text model"
    senses = {tower.input_modalities} if isinstance(tower.input_modalities, str) else set(tower.input_modalities)
    words = {*path.split("_"), *str(tower.config.model_type).split("_")}
    if senses == {"audio"} or words & {"audio", "speech"}:
        return "the audio tower"
    return "the vision tower" if senses <= {"image", "video"} or "vision" in words else "an encoder beside the text model"
