"""Adapters made as long as in one process, and configs that would be wrong on a parallel model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from shardwise.adapters.find import PROMPTS, kind_of, ordinary_name, type_of, unwrapped, wrappers
from shardwise.adapters.prefix import PREFIXES, prefix_layouts
from shardwise.errors import ShardwiseError, describe
from shardwise.layers import stores_transposed
from shardwise.plan import Plan

_INITS = (True, False, "gaussian", "orthogonal")
_REFUSED = (
    "layer_replication",
    "trainable_token_indices",
    "megatron_config",
    "velora_config",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
)


def whole_as_planned(model: nn.Module, configs: Mapping[str, Any], plan: Plan) -> None:
    """Make the adapters around layers of which PEFT reads the width from their weight (Conv1D) anew, as long as in one process.

    Raises `ShardwiseError` for configs of adapters that would be wrong on a parallel model.
    """
    for name, config in configs.items():
        check_config(name, config, plan, changed=True)
    for name, wrapper in wrappers(model):
        base, row = unwrapped(wrapper), plan.get(f"{ordinary_name(name)}.weight")
        if kind_of(wrapper) != "lora" or not stores_transposed(base) or row is None or not row.sharded:
            continue
        if (wrapper.in_features, wrapper.out_features) == row.shape:
            continue
        wrapper.in_features, wrapper.out_features = row.shape
        for adapter in list(wrapper.lora_A):
            rank, alpha = wrapper.r[adapter], wrapper.lora_alpha[adapter]
            trains = wrapper.lora_A[adapter].weight.requires_grad
            wrapper.update_layer(adapter, rank, lora_alpha=alpha, config=configs[adapter], target_name=name)
            for part in (wrapper.lora_A, wrapper.lora_B):
                part[adapter].requires_grad_(trains)


def check_config(name: str, config: Any, plan: Plan, changed: bool = False) -> None:
    """Raise `ShardwiseError` for an adapter that would be wrong on a model that is parallel by `plan`.

    Args:
        name: the adapter's.
        config: PEFT's.
        changed: PEFT has put it into the model already.
    """
    found = next(_config_problems(config, plan), None)
    if found is not None:
        note = {"note": "the model has been changed by PEFT already: load it again"} if changed else {}
        raise ShardwiseError(
            describe(
                f"Adapter {name!r} is not possible on a parallel model: {found}.",
                **note,
                either=[
                    "plain LoRA, or DoRA, on linear layers, or",
                    "add the adapter to the ordinary model, and train it in one process",
                ],
            )
        )


def _config_problems(config: Any, plan: Plan) -> Iterator[str]:
    kind = type_of(config)
    if kind in PROMPTS:
        if getattr(config, "modules_to_save", None):
            yield f"modules_to_save beside {kind}"
        return
    if kind in PREFIXES:
        try:
            prefix_layouts(plan)
        except ShardwiseError as error:
            yield f"it is of type {kind}, and {error}"
        return
    if kind != "LORA":
        yield f"it is of type {kind}, not LORA"
        return
    init = getattr(config, "init_lora_weights", True)
    if init not in _INITS:
        yield f"init_lora_weights={init!r} works on whole weights, and changes them"
    for field_name in _REFUSED:
        if getattr(config, field_name, None):
            yield f"{field_name} is set"
    if getattr(config, "target_modules_to_tie", None):
        yield "ensure_weight_tying ties adapters of the embedding and the head, of which a rank has other parts"
