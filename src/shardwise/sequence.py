"""Which modules of a model work on slices of the sequence, and what each does: the rows of sequence parallelism.

A decoder fits that is a list of layers, each of norms, dropouts and additions around modules that take the hidden states and
give hidden states. Whatever else would see a part of the positions where it expects all is refused, by name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from shardwise.errors import PlanError, describe
from shardwise.layers import (
    ColwiseGatherOutput,
    ColwiseParallel,
    LinearStyle,
    ParallelStyle,
    Replicate,
    RowwiseInner,
    RowwiseParallel,
    RowwiseScatterOutput,
    RowwiseSplitInput,
    SequenceLayer,
    SequencePointwise,
    SequenceRegion,
    SequenceRowwise,
    SequenceStyle,
    SequenceWhole,
)
from shardwise.layers.region import drops_out
from shardwise.plan import Plan
from shardwise.spec import ModuleSpec, ShardSpec, sums_gradient

_KNOWN = frozenset(
    {
        *("hidden_states", "attention_mask", "position_ids", "position_embeddings", "past_key_values", "past_key_value"),
        *("layer_past", "use_cache", "cache_position", "output_attentions", "output_router_logits", "args", "kwargs"),
        *("flash_attn_kwargs",),
    }
)
_CROSS = frozenset({"encoder_hidden_states", "encoder_attention_mask"})
_FIRST = frozenset({"hidden_states", "hidden_state", "x", "input", "inputs"})


def with_sequence(model: nn.Module, plan: Plan) -> Plan:
    """`plan`, such that the layers of `model`'s decoder work on slices of the sequence.

    Raises `PlanError` for a model that does more with its hidden states than that allows, naming the module and why.
    """
    if plan.size == 1 or has_sequence(plan):
        return plan
    return _Choice(model, plan).made()


@dataclass
class _Choice:
    model: nn.Module
    plan: Plan

    def __post_init__(self) -> None:
        self.modules = {row.name: row for row in self.plan.modules}
        self.tensors: dict[str, ShardSpec] = {}
        self.order = [name for name, _ in self.model.named_modules()]

    def made(self) -> Plan:
        name, layers = self._decoder()
        for index, layer in enumerate(layers):
            self._layer(f"{name}.{index}", layer, {"first": int(index == 0), "last": int(index == len(layers) - 1)})
        rows = tuple(self.modules[name] for name in self.order if name in self.modules)
        tensors = tuple(self.tensors.get(row.name, row) for row in self.plan.tensors)
        return replace(self.plan, tensors=tensors, modules=rows)

    def _decoder(self) -> tuple[str, list[nn.Module]]:
        """The list of layers, and its name."""
        lists = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m) and self._sharded(n)}
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        if len(outer) != 1:
            what = (
                f"has {len(outer)} lists of parallel layers ({', '.join(outer)})" if outer else "has no list of parallel layers"
            )
            raise _refused(type(self.model).__name__, f"it {what}, and one decoder's residual stream is cut")
        layers = list(lists[outer[0]])
        if len({id(layer) for layer in layers}) < len(layers):
            raise _refused(outer[0], "it has the same layer several times")
        parent = self.model.get_submodule(outer[0].rpartition(".")[0])
        if getattr(parent, "layerdrop", None):
            raise _refused(outer[0], f"layerdrop={parent.layerdrop} leaves out layers, also the one that cuts the stream")
        return outer[0], layers

    def _layer(self, name: str, layer: nn.Module, options: dict[str, int]) -> None:
        _check_arguments(name, layer, _KNOWN, frozenset({"hidden_states"}))
        self._check_own(name, layer)
        summed: list[str] = []
        regions = 0
        for child, module in layer.named_children():
            full = f"{name}.{child}"
            self._check_child(full, module)
            if self._sharded(full):
                summed += self._region(full, module)
                regions += 1
            elif isinstance(module, nn.Identity | _DropoutNd) or _is_norm(module):
                summed += self._pointwise(full, module)
            elif any(True for _ in module.parameters()) or not type(module).__module__.startswith("torch.nn"):
                self._whole(full, module)
        if not regions:
            raise _refused(name, "no module in it is parallel")
        own = tuple(other.removeprefix(f"{name}.") for other in summed)
        self._put(name, SequenceLayer, options, stream_parameters=own)

    def _check_own(self, name: str, layer: nn.Module) -> None:
        """The layer itself must be norms, modules and additions: what it has of its own may be a number, no more."""
        for child, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if tensor.numel() > 1 or isinstance(tensor, nn.Parameter):
                raise _refused(f"{name}.{child}", "it is the layer's own, which may combine it with all positions")
        for key, rate in vars(layer).items():
            if "drop" in key and isinstance(rate, float) and rate > 0:
                raise _refused(name, f"it drops out elements by {key}={rate} itself, with masks that every rank would share")

    def _check_child(self, name: str, module: nn.Module) -> None:
        """A module that the layer calls must take and give hidden states that are the same on every rank."""
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise _refused(name, "the layer calls what is in it, not it")
        row = self.modules.get(name)
        if row is not None and issubclass(row.style, LinearStyle):
            raise _refused(name, "the layer itself has a linear layer that is split, so what it computes between two is local")

    def _region(self, name: str, module: nn.Module) -> list[str]:
        closing = self._pure(name, module)
        if closing is None:
            self._whole(name, module)
            return []
        _check_arguments(name, module, _KNOWN | _FIRST, _FIRST)
        self._put(name, SequenceRegion, {"drops_out": int(drops_out(module))})
        for child in (row for row in self.plan.modules if row.name.rpartition(".")[0] == name):
            if issubclass(child.style, ColwiseParallel | RowwiseParallel):
                self.modules[child.name] = replace(child, region=True)
        self._put(closing, SequenceRowwise, {})
        return self._partial(closing, ("bias",))

    def _pure(self, name: str, module: nn.Module) -> str | None:
        """The row-wise layer that ends the module, where all that it computes lies between column-wise layers and that."""
        closing, opening = [], 0
        for inner, part in module.named_modules(prefix=name):
            own = [self.plan[f"{inner}.{child}"] for child, _ in part.named_parameters(recurse=False)]
            row = self.modules.get(inner)
            style = row.style if row is not None else Replicate
            direct = inner.rpartition(".")[0] == name
            if direct and issubclass(style, ColwiseParallel) and not issubclass(style, ColwiseGatherOutput):
                opening += 1
            elif (
                direct
                and issubclass(style, RowwiseParallel)
                and not issubclass(style, RowwiseSplitInput | RowwiseScatterOutput | RowwiseInner)
            ):
                closing.append(inner)
                if self._summed(self.plan[f"{inner}.weight"]):
                    return None
            elif not issubclass(style, Replicate) or not all(spec.sharded or self._summed(spec) for spec in own):
                return None
        return closing[0] if opening and len(closing) == 1 else None

    def _summed(self, spec: ShardSpec) -> bool:
        return sums_gradient(spec, self.plan.size, self.plan.ep_size)

    def _pointwise(self, name: str, module: nn.Module) -> list[str]:
        names = [child for child, _ in module.named_parameters()]
        if any(self.plan[f"{name}.{child}"].partial for child in names) or name in self.modules:
            raise _refused(
                name, f"it has the style {self.modules[name].style.__name__ if name in self.modules else ''} already"
            )
        if names or drops_out(module):
            self._put(name, SequencePointwise, {"drops_out": int(drops_out(module))})
        return self._partial(name, tuple(names))

    def _whole(self, name: str, module: nn.Module) -> None:
        _check_arguments(name, module, _KNOWN | _FIRST, _FIRST)
        self._put(name, SequenceWhole, {})

    def _partial(self, name: str, children: tuple[str, ...]) -> list[str]:
        """Say of these parameters of the module called `name` that their gradients are parts, and give their names."""
        found = [f"{name}.{child}" for child in children if f"{name}.{child}" in self.plan]
        for full in found:
            row = self.plan[full]
            if row.aliases:
                raise _refused(full, f"it is tied to {', '.join(row.aliases)}")
            self.tensors[row.name] = replace(row, partial=True)
        return found

    def _put(
        self, name: str, style: type[ParallelStyle], options: dict[str, int], stream_parameters: tuple[str, ...] = ()
    ) -> None:
        row = self.modules.get(name)
        if row is None:
            self.modules[name] = ModuleSpec(name, style, options=options, stream_parameters=stream_parameters)
        else:
            both = {**row.options, **options}
            self.modules[name] = replace(row, around=style, options=both, stream_parameters=stream_parameters)

    def _sharded(self, name: str) -> bool:
        return any(row.sharded and row.name.startswith(f"{name}.") for row in self.plan.tensors)


def has_sequence(plan: Plan) -> bool:
    """Whether `plan` is that of a sequence-parallel model."""
    return any(row.around is not None or issubclass(row.style, SequenceStyle) for row in plan.modules)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm over each position's features."""
    if "norm" not in type(module).__name__.lower() or isinstance(module, _NormBase | nn.GroupNorm):
        return False
    return not module._modules and all(p.dim() <= 1 for p in module.parameters())


def _check_arguments(name: str, module: nn.Module, known: frozenset[str], first: frozenset[str]) -> None:
    kind = type(module).__name__
    names = [argument for argument in inspect.signature(type(module).forward).parameters if argument != "self"]
    if not names or names[0] not in first:
        raise _refused(name, f"{kind} takes {names[0] if names else 'nothing'} first, not the hidden states")
    # Decoders that could read an encoder's output have these arguments even where they have no attention to it.
    unused = _CROSS if not any("cross" in inner.lower() for inner, _ in module.named_modules()) else frozenset()
    if other := [argument for argument in names if argument not in known | unused]:
        raise _refused(name, f"{kind} also takes {', '.join(other)}, which may be of all positions")


def _refused(name: str, why: str) -> PlanError:
    return PlanError(
        describe(f"sequence_parallel=True: {name} can't work on a slice of the sequence: {why}.", either=["leave it out"])
    )
