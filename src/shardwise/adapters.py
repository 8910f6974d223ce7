"""Adapters that PEFT puts around the layers of a parallel model: where they are, and how their tensors lie on the ranks.

    base layer            A (rank, in)       B (out, rank)
    column-wise           whole              column-wise: cut as the base's outputs
    row-wise              row-wise: cut as   whole
                          the base's inputs
    kept whole            whole              whole
    an embedding          whole              whole

PEFT makes every adapter as long as the layer is in one process (it reads `in_features` and `out_features`), so the same seed
gives the same adapter; then each rank keeps its part. What is no LoRA, or changes the base layer's weight, is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from shardwise.errors import ShardwiseError, describe
from shardwise.layers import (
    ColwiseGatherOutput,
    ColwiseParallel,
    CommonDropout,
    EmbeddingStyle,
    LocalDropout,
    MlaKvAProjGatherOutput,
    MlaKvAProjParallel,
    ParallelStyle,
    Replicate,
    ReplicatedWithGradAllReduce,
    RowwiseParallel,
    RowwiseScatterOutput,
    RowwiseSplitInput,
    WholeEmbeddingAdapter,
    is_parallel,
    stores_transposed,
)
from shardwise.layout import Layout, Packed, Replicated, Sharded
from shardwise.plan import Plan
from shardwise.spec import ModuleSpec, ShardSpec, sums_gradient

_INITS = (True, False, "gaussian", "orthogonal")
_WRAPPED = ("base_layer", "original_module")


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put anything into `model`."""
    return next(wrappers(model), None) is not None


def adapted_model(model: nn.Module) -> nn.Module:
    """The model inside of a `PeftModel`; any other is returned as it is.

    Raises `ShardwiseError` where PEFT has put something into it that does not become parallel afterwards.
    """
    inner: nn.Module = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model  # type: ignore[operator]
    for name, wrapper in wrappers(inner):
        if _kind(wrapper) != "lora" or not isinstance(inner, PreTrainedModel):
            raise ShardwiseError(
                describe(
                    f"{name}: a model with {type(wrapper).__name__} in it cannot become parallel.",
                    either=[
                        "make the ordinary transformers model parallel, and add the adapter then, or",
                        "plain LoRA on linear layers and embeddings",
                    ],
                )
            )
    return inner


def ordinary_name(name: str) -> str:
    """A tensor's name without what PEFT puts into it: "q_proj.base_layer.weight" gives "q_proj.weight"."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer inside of PEFT's layers around it."""
    while inner := next((module._modules[name] for name in _WRAPPED if module._modules.get(name) is not None), None):
        module = inner
    return module


def copied_layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The parallel layers that are trained whole (`modules_to_save`): the original, and an adapter's copy of it."""
    for _, wrapper in wrappers(model):
        for copy in wrapper.modules_to_save.values() if _kind(wrapper) == "copy" else ():
            for name, module in wrapper.original_module.named_modules():
                if is_parallel(module):
                    yield module, copy.get_submodule(name)


def adapter_plan(model: nn.Module, plan: Plan) -> Plan:
    """The rows of all adapters in `model`, by the names that they have there now: tensors, and modules that become parallel.

    Raises `ShardwiseError` for an adapter that would be wrong on a parallel model.
    """
    known = {row.name: row for row in plan.modules}
    found = _Found(plan)
    for name, wrapper in wrappers(model):
        layer = _Layer(name, wrapper, unwrapped(wrapper), plan, known.get(ordinary_name(name)))
        kind = _kind(wrapper)
        if kind == "lora":
            layer.check()
            layer.add_to(found)
        elif kind == "copy":
            found.add_copies(layer)
        elif layer.concerned:
            raise layer.refused(f"{type(wrapper).__name__} is no plain LoRA layer, and the layer in it is parallel")
    return Plan(plan.size, tuple(found.tensors), tuple(found.modules), plan.ep_size)


@dataclass
class _Found:
    plan: Plan
    tensors: list[ShardSpec] = field(default_factory=list)
    modules: list[ModuleSpec] = field(default_factory=list)

    def add_linear(
        self, name: str, linear: nn.Module, style: type[ParallelStyle] | None, rows: Mapping[str, ShardSpec]
    ) -> None:
        """One of the two products of a LoRA layer."""
        self.tensors += [replace(row, name=f"{name}.{child}") for child, row in rows.items()]
        if style is not None:
            self.modules.append(ModuleSpec(name, style))

    def add_copies(self, layer: _Layer) -> None:
        """Layers that are trained whole (`modules_to_save`): copies of parallel ones, which lie as these do."""
        for name, tensor in layer.wrapper.named_parameters():
            kind, _, rest = name.partition(".")
            _, _, inner = rest.partition(".")
            row = self.plan.get(f"{ordinary_name(layer.name)}.{inner}") if kind == "modules_to_save" else None
            if row is not None:
                self.tensors.append(replace(row, name=f"{layer.name}.{name}", aliases=(), dtype=tensor.dtype))


@dataclass
class _Layer:
    """A layer of PEFT's in a parallel model: its path there, itself, the layer in it, and what the table says of that."""

    name: str
    wrapper: Any
    base: nn.Module
    plan: Plan
    spec: ModuleSpec | None

    @property
    def weight(self) -> ShardSpec | None:
        """The base layer's row."""
        return self.plan.get(f"{ordinary_name(self.name)}.weight")

    @property
    def concerned(self) -> bool:
        """Whether tensor parallelism changes anything in the base layer."""
        prefix = f"{ordinary_name(self.name)}."
        rows = [row for row in self.plan if any(name.startswith(prefix) for name in (row.name, *row.aliases))]
        return any(is_parallel(m) for m in self.base.modules()) or any(row.sharded or row.partial for row in rows)

    def refused(self, why: str) -> ShardwiseError:
        """The error that says so."""
        return ShardwiseError(
            describe(
                f"{self.name}: an adapter that shardwise cannot make parallel: {why}.",
                either=[
                    "plain LoRA on linear layers and embeddings (rank and scaling as you like), or",
                    "shardwise.unparallelize(model) before the adapter is added",
                ],
            )
        )

    def check(self) -> None:
        """Raise `ShardwiseError` for what works on the base layer's whole weight, of which a rank has a part."""
        if not self.concerned:
            return
        if self.spec is not None and self.spec.axis == "ep":
            raise self.refused("the layer belongs to an expert that other ranks don't have")
        for adapter, variant in self.wrapper.lora_variant.items():
            raise self.refused(f"adapter {adapter!r} is a {type(variant).__name__}, which needs the whole weight")

    def add_to(self, found: _Found) -> None:
        """The rows of each adapter in this layer."""
        if self.wrapper.lora_embedding_A:
            self._add_embedding(found)
            return
        style = self.spec.style if self.spec is not None else Replicate
        if issubclass(style, EmbeddingStyle):
            raise self.refused("a linear adapter around an embedding")
        for adapter, a in self.wrapper.lora_A.items():
            b = self.wrapper.lora_B[adapter]
            first, second, rows_of = self._styles(style)
            self._add(found, "lora_A", adapter, a, first, rows_of)
            self._add(found, "lora_B", adapter, b, second, rows_of)
            self._add_dropout(found, adapter, first, style)

    def _styles(
        self, style: type[ParallelStyle]
    ) -> tuple[type[ParallelStyle] | None, type[ParallelStyle] | None, type[ParallelStyle]]:
        """Of A, of B, and of the base."""
        if issubclass(style, (MlaKvAProjGatherOutput, MlaKvAProjParallel, RowwiseScatterOutput)):
            raise self.refused(f"the layer's style, {style.__name__}, does more than cut a product")
        if issubclass(style, ColwiseParallel):
            return None, ColwiseGatherOutput if issubclass(style, ColwiseGatherOutput) else ColwiseParallel, style
        if issubclass(style, RowwiseParallel):
            return RowwiseSplitInput if issubclass(style, RowwiseSplitInput) else RowwiseParallel, None, style
        if style not in (Replicate, ReplicatedWithGradAllReduce):
            raise self.refused(f"the layer's style is {style.__name__}")
        row = self.weight
        if row is not None and sums_gradient(row, self.plan.size, self.plan.ep_size):
            return ReplicatedWithGradAllReduce, ReplicatedWithGradAllReduce, style
        return None, None, style

    def _add(
        self,
        found: _Found,
        part: str,
        adapter: str,
        linear: nn.Module,
        style: type[ParallelStyle] | None,
        base: type[ParallelStyle],
    ) -> None:
        name, rows = f"{self.name}.{part}.{adapter}", {}
        for child, tensor in linear.named_parameters():
            layout = self._layout(style, part, tensor.dim())
            shape = self._full_shape(part, tensor)
            partial = style is ReplicatedWithGradAllReduce or (style is not None and part == "lora_B" and self._partial())
            rows[child] = ShardSpec(f"{name}.{child}", shape, tensor.dtype, layout, partial)
        found.add_linear(name, linear, style, rows)

    def _partial(self) -> bool:
        row = self.weight
        return row is not None and row.partial

    def _layout(self, style: type[ParallelStyle] | None, part: str, dims: int) -> Layout:
        """The base weight's cut, along the dim of it that the adapter's matrix has too."""
        row = self.weight
        if style is None or row is None or row.layout.cut(row.shape) is None or (part == "lora_A" and dims == 1):
            return Replicated()
        assert isinstance(row.layout, Sharded | Packed)
        return replace(row.layout, dim=0 if part == "lora_B" else 1)

    def _full_shape(self, part: str, tensor: Tensor) -> tuple[int, ...]:
        row = self.weight
        if row is None:
            return tuple(tensor.shape)
        outputs, inputs = reversed(row.shape) if stores_transposed(self.base) else row.shape
        if part == "lora_B":
            return (outputs, *tensor.shape[1:])
        return (tensor.shape[0], inputs)

    def _add_dropout(self, found: _Found, adapter: str, first: type[ParallelStyle] | None, style: type[ParallelStyle]) -> None:
        if not isinstance(self.wrapper.lora_dropout[adapter], nn.Dropout) or not self.concerned:
            return
        local = first is RowwiseParallel
        name = f"{self.name}.lora_dropout.{adapter}"
        found.modules.append(
            ModuleSpec(name, LocalDropout if local else CommonDropout, region=issubclass(style, ColwiseParallel))
        )

    def _add_embedding(self, found: _Found) -> None:
        row, wrapper = self.weight, self.wrapper
        if row is not None and sums_gradient(row, self.plan.size, self.plan.ep_size):
            raise self.refused("each rank has a part of the embedding's gradient")
        for part, parameters in (
            ("lora_embedding_A", wrapper.lora_embedding_A),
            ("lora_embedding_B", wrapper.lora_embedding_B),
        ):
            for adapter, tensor in parameters.items():
                name = f"{self.name}.{part}.{adapter}"
                found.tensors.append(ShardSpec(name, tuple(tensor.shape), tensor.dtype, Replicated()))
        if self.spec is not None and issubclass(self.spec.style, EmbeddingStyle):
            found.modules.append(ModuleSpec(self.name, WholeEmbeddingAdapter))


def whole_as_planned(model: nn.Module, configs: Mapping[str, Any], plan: Plan) -> None:
    """Make the adapters around layers of which PEFT reads the width from their weight (Conv1D) anew, as long as in one process.

    Raises `ShardwiseError` for configs of adapters that would be wrong on a parallel model.
    """
    _check_configs(configs)
    for name, wrapper in wrappers(model):
        base, row = unwrapped(wrapper), plan.get(f"{ordinary_name(name)}.weight")
        if _kind(wrapper) != "lora" or not stores_transposed(base) or row is None or not row.sharded:
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


def _check_configs(configs: Mapping[str, Any]) -> None:
    for name, config in configs.items():
        found = next(_config_problems(config), None)
        if found is not None:
            raise ShardwiseError(
                describe(
                    f"Adapter {name!r} is not possible on a parallel model: {found}.",
                    note="the model has been changed by PEFT already: load it again",
                    either=["leave that out, or", "add the adapter to the ordinary model, and train it in one process"],
                )
            )


def _config_problems(config: Any) -> Iterator[str]:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        yield f"it is of type {kind}, not LORA"
        return
    init = getattr(config, "init_lora_weights", True)
    if init not in _INITS:
        yield f"init_lora_weights={init!r} works on whole weights, and changes them"
    for field_name in ("layer_replication", "trainable_token_indices", "megatron_config"):
        if getattr(config, field_name, None):
            yield f"{field_name} is set"
    if getattr(config, "bias", "none") != "none":
        yield f"bias={config.bias!r} would save a rank's part of the biases"


def wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers in `model`, outermost first, by path."""
    kinds = _peft_kinds()
    last: str | None = None
    for name, module in model.named_modules() if kinds else ():
        if isinstance(module, kinds) and not (last is not None and name.startswith(f"{last}.")):
            last = name
            yield name, module


def _peft_kinds() -> tuple[type, ...]:
    # Who has adapters has imported PEFT; nobody else needs it.
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _kind(wrapper: object) -> str:
    from peft.tuners import lora
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(wrapper, lora.Linear | lora.Embedding):
        return "lora"
    return "copy" if isinstance(wrapper, ModulesToSaveWrapper) else "other"
