"""The plans that transformers' models bring, and the names in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from shardwise.errors import PlanError, describe
from shardwise.hf.towers import around_text, end_of, text_prefix, token_embedding, tower_rules
from shardwise.layers import ColwiseGatherOutput, ColwiseParallel
from shardwise.plan import Plan, wildcard
from shardwise.plans import corrections, dealt_experts
from shardwise.plans.frozen import frozen_rules
from shardwise.spec import Rule

_Module = TypeVar("_Module", bound=nn.Module)


def model_rules(model: nn.Module, size: int, expert_parallel: bool = False) -> list[Rule]:
    """The rules that `model` brings (as transformers merges them from its class and config), then our corrections.

    Args:
        model: a transformers model; any other module brings no rules.
        size: ranks on the tp axis.
        expert_parallel: take the model's expert-parallel rules for the experts.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    own, experts = dict(model._tp_plan or {}), _expert_rules(model) if expert_parallel else []
    dealt = {rule.pattern for rule in experts}
    rules = [*(Rule(pattern, style, "model") for pattern, style in own.items() if pattern not in dealt), *experts]
    # A correction of how experts are split is none of how they are dealt.
    ours = [rule for rule in _corrections(model, size) if rule.pattern not in dealt]
    found = rules + (_vocabulary(model, rules) if rules or ours else []) + ours
    return found + tower_rules(model, found)


LARGE = 0.02
"""Of the model's elements: what a frozen plan does not name, and is larger, is cut where that can be done anywhere."""

Kept = Callable[[str, nn.Module, str, int], list[Rule]]
"""The rules that are kept for a type, as `shardwise.plans.frozen.frozen_rules`."""


def frozen_model_rules(model: nn.Module, size: int, kept: Kept = frozen_rules) -> list[Rule]:
    """The rules of the frozen plans of the types that `model` is made of, with all other matrices whole; none where there is
    none for the type of the outermost, or none for its options.
    """
    bases = _bases(model) if isinstance(model, PreTrainedModel) else []
    found: list[Rule] = []
    for number, (prefix, base) in enumerate(bases):
        rules = kept(base.config.model_type, base, prefix, size)
        if number == 0 and not rules:
            return []
        found += rules
    if not found:
        return []
    assert isinstance(model, PreTrainedModel)
    found += _vocabulary(model, found)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {rule.pattern for rule in found}
    named = {id(p) for name, p in parameters.items() if name in names or name.rpartition(".")[0] in names}
    rest = [name for name, p in parameters.items() if p.dim() > 1 and id(p) not in named]
    total = sum(p.numel() for p in model.parameters())
    large = {name for name in rest if parameters[name].numel() > LARGE * total}
    free = {name for name in large if "*" not in wildcard(name) or not any(name.startswith(prefix) for prefix, _ in bases)}
    return found + [_left_over(model, name, name in free, size) for name in rest]


def _left_over(model: nn.Module, name: str, free: bool, size: int) -> Rule:
    """The rule for a matrix that is in no part that can be computed apart: a large one outside of the layers, which is `free`,
    is cut all the same.
    """
    owner = name.rpartition(".")[0]
    module = model.get_submodule(owner)
    if free:
        if type(module) is nn.Linear and module.out_features >= size:
            return Rule(owner, "colwise_gather_output", "frozen", reason="its weight is cut, and its outputs gathered")
        if type(module) is nn.Embedding and module.num_embeddings >= size:
            return Rule(owner, "embedding_rowwise", "frozen", reason="rows are looked up one by one")
    return Rule(name, "replicate", "frozen", reason="in no part that can be computed apart")


def base_model(model: nn.Module) -> PreTrainedModel:
    """The outermost model inside of a transformers model to which the patterns of its type's plan are relative."""
    assert isinstance(model, PreTrainedModel)
    return _bases(model)[0][1]


def is_of_transformers(model: nn.Module) -> bool:
    """Whether the class of `model` is one of transformers' own, not a repository's or the user's."""
    return type(model).__module__.startswith("transformers.")


def has_expert_plan(model: nn.Module) -> bool:
    """Whether there are rules for expert parallelism for `model`, its own or ours."""
    return isinstance(model, PreTrainedModel) and bool(_expert_rules(model))


def base_prefixes(model: nn.Module) -> list[str]:
    """The paths inside `model` to which a config's patterns are relative: that of the base model ("model." of a
    LlamaForCausalLM), and that of a wrapper's text model ("model.language_model." of a LlavaForConditionalGeneration).
    """
    if not isinstance(model, PreTrainedModel):
        return []
    base = [f"{model.base_model_prefix}."] if model.base_model is not model else []
    text = text_prefix(model)
    return base + ([text] if text is not None and text not in base else [])


def check_head(model: nn.Module, plan: Plan) -> None:
    """Raise `PlanError` when the head's outputs would stay in parts: each rank would take its slice of the logits for all."""
    head = _head(model) if isinstance(model, PreTrainedModel) else None
    row = next((row for row in plan.modules if head is not None and row.name == head[0]), None)
    if row is None or not issubclass(row.style, ColwiseParallel) or issubclass(row.style, ColwiseGatherOutput):
        return
    raise PlanError(
        describe(
            f"{row.name}: its outputs are the logits, and each rank would be left with its slice of them.",
            rule=str(row.rule),
            either=['"colwise_gather_output" for it, or', f'"replicate" for it: tp_plan={{"{row.name}": "replicate"}}'],
        )
    )


def _vocabulary(model: PreTrainedModel, rules: list[Rule]) -> list[Rule]:
    """Rules for the embedding and the head, where none of the model's names them: both are large."""
    reason = "the vocabulary is large, and no rule of the model's names it"
    found: list[Rule] = []
    embedding, head = _named(model, token_embedding(model)), _head(model)
    known = next((rule for rule in rules if embedding is not None and rule.matches(embedding[0])), None)
    if embedding is not None and known is None:
        found += [Rule(name, "embedding_rowwise", "shardwise", reason=reason) for name in _tied(model, embedding[1])]
    if head is None or any(rule.matches(head[0]) for rule in rules):
        return found
    tied = embedding is not None and embedding[1].weight is head[1].weight
    if not tied or known is None or known.style == "embedding_rowwise":
        found.append(Rule(head[0], "colwise_gather_output", "shardwise", reason=reason))
    return found


def _tied(model: nn.Module, embedding: nn.Embedding) -> list[str]:
    """The embeddings of the same weight: an encoder and a decoder may have one each."""
    known = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    return [name for name, module in known if module.weight is embedding.weight]


def _head(model: PreTrainedModel) -> tuple[str, nn.Linear] | None:
    ends = (end_of(part, "get_output_embeddings", nn.Linear) for part in around_text(model) or [model])
    return _named(model, next(filter(None, ends), None))


def _named(model: nn.Module, wanted: _Module | None) -> tuple[str, _Module] | None:
    name = next((name for name, module in model.named_modules() if module is wanted), None)
    return (name, wanted) if wanted is not None and name is not None else None


def _corrections(model: PreTrainedModel, size: int) -> list[Rule]:
    found = [rule for prefix, base in _bases(model) for rule in corrections(base.config.model_type, base, prefix, size)]
    inside = {base.config.model_type for _, base in _bases(model)}
    kind = model.config.model_type  # of a model with a head, around a base model of another type
    return found if kind in inside else [*found, *corrections(kind, model, "", size)]


def _expert_rules(model: PreTrainedModel) -> list[Rule]:
    own = [Rule(pattern, style, "model") for pattern, style in (model._ep_plan or {}).items()]
    return own + [rule for prefix, base in _bases(model) for rule in dealt_experts(base.config.model_type, base, prefix)]


def _bases(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    named = [(f"{name}." if name else "", module) for name, module in model.named_modules()]
    return [(prefix, m) for prefix, m in named if isinstance(m, PreTrainedModel) and m.base_model is m]
