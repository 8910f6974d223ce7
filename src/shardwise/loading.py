"""From a checkpoint to this rank's shards: transformers builds the model at its full shapes without data, then each shard is
read.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from shardwise.api import model_state, parallelize, same_everywhere
from shardwise.checkpoint import CheckpointFiles, dequantized, find_checkpoint, fingerprint, open_checkpoint, read_whole
from shardwise.errors import PlanError, ShardwiseError, describe
from shardwise.hf import (
    adapter_and_base,
    attach_generation_config,
    load_adapter,
    load_lazily,
    quantization,
    resolve_model_class,
    without_quantization,
)
from shardwise.layers import original_class
from shardwise.lazy import LazyTensor, read, read_into
from shardwise.mesh import expert_axis, local_device, tp_mesh
from shardwise.model import ShardedModel
from shardwise.model_state import ModelState, required_state
from shardwise.parallelize import apply_plan
from shardwise.planning import PlanLike, asked_ep_size, proven_plan
from shardwise.random_state import same_random_state
from shardwise.rendezvous import START_TIMEOUT, meet
from shardwise.replicas import check_same, together
from shardwise.spec import ShardSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_MODEL_KEYWORDS = ("attn_implementation", "experts_implementation", "key_mapping", "ignore_mismatched_sizes")
_PLACED = "each rank's shards go to its own device"
_QUANTIZED = "weights are not quantized while they are loaded, and checkpoints that are quantized are read without it"
_REFUSED = {
    "device_map": _PLACED,
    "quantization_config": _QUANTIZED,
    "gguf_file": "weights are read from safetensors or .bin files",
    "state_dict": "weights are read from files; shardwise.parallelize(model) takes a model that is in memory",
    "load_in_8bit": _QUANTIZED,
    "load_in_4bit": _QUANTIZED,
    "distributed_config": "tp_plan, tp_size and device_mesh say how the model is distributed",
    "offload_folder": _PLACED,
}
"""Keywords of transformers', and why they don't go together with ours."""


def from_pretrained(
    auto_class: Any,
    path_or_id: str | os.PathLike[str],
    *,
    tp_plan: PlanLike | None = None,
    tp_size: int | None = None,
    device_mesh: DeviceMesh | None = None,
    ep_size: int | None = None,
    overlap: bool = False,
    sequence_parallel: bool = False,
    strict: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Load this rank's shards of a checkpoint into the transformers model that `auto_class` stands for. Collective.

    Args:
        auto_class: a transformers Auto class, or a concrete model class.
        path_or_id: a directory with safetensors files (or, without these, `.bin` files), or a hub id; or one of an adapter of
            PEFT's, which is put into the model that its config names.
        tp_plan: `"auto"`, `"infer"`, a dict of pattern: style merged over the model's own plan, a `Plan`, or the path of a file
            that one was saved to. Without it, and without `tp_size` and `device_mesh`, the call is transformers' own.
        tp_size: ranks on the tp axis, by default all processes.
        device_mesh: the caller's mesh (one-dimensional, or with an axis named "tp").
        ep_size: ranks over which experts are dealt: those of the tp axis, or a multiple of them.
        overlap, sequence_parallel: as in `shardwise.parallelize`.
        strict: parameters that the checkpoint doesn't have, and keys that the model has no place for, are errors. With False
            these are initialised newly, alike on all ranks, and left out, as plain transformers does; one warning names them.
            Either way, a head that another class than the checkpoint's has or lacks is allowed.
        kwargs: transformers' own keywords (`dtype`, `attn_implementation`, `revision`, `output_loading_info`, ...).

    In one process the ordinary model is loaded. Raises `PlanError`, before a weight is read, for a plan that can't be carried
    out; `CheckpointError` for a checkpoint that does not fit; `MismatchError` when another rank failed.
    """
    ep_size = asked_ep_size(tp_plan, ep_size)
    if (tp_plan, tp_size, device_mesh, ep_size) == (None, None, None, None):
        _refuse_lone(overlap, sequence_parallel)
        return _ordinary(auto_class, path_or_id, kwargs)
    axis = tp_mesh(tp_size, device_mesh, ep_size)
    if axis is None or max(axis.size(), ep_size or 1) == 1:
        return cast(nn.Module, _on_device(_ordinary(auto_class, path_or_id, kwargs), local_device(axis)))
    if getattr(kwargs.get("quantization_config"), "dequantize", False):
        del kwargs["quantization_config"]  # as it is done anyway
    _refuse_other_ways(kwargs)
    ep = expert_axis(axis, ep_size)
    meet(ep, "from_pretrained", START_TIMEOUT)
    plan = "auto" if tp_plan is None else tp_plan
    how = (ep_size, overlap, sequence_parallel, strict)
    request = _Request(auto_class, os.fspath(path_or_id), axis, ep, plan, *how, _shared_seed(ep), kwargs)
    with torch.inference_mode(False):  # parameters made in inference mode could never be trained
        model = together(ep, "from_pretrained", request.load)
    request.check_agreement(model)
    if request.adapter is not None:
        load_adapter(model, request.adapter, request.adapter_name, **request.adapter_kwargs)
    same_random_state(axis)
    return (model, request.loading_info) if request.wants_info else model  # type: ignore[return-value]


def from_config(
    auto_class: Any,
    config: PreTrainedConfig,
    *,
    tp_plan: PlanLike | None = None,
    tp_size: int | None = None,
    device_mesh: DeviceMesh | None = None,
    ep_size: int | None = None,
    overlap: bool = False,
    sequence_parallel: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A freshly initialised model, the same on every rank whatever their seeds, in shards. Arguments as in `from_pretrained`.
    Collective.
    """
    ep_size = asked_ep_size(tp_plan, ep_size)
    given = (tp_plan, tp_size, device_mesh, ep_size) != (None, None, None, None)
    if not given:
        _refuse_lone(overlap, sequence_parallel)
    axis = tp_mesh(tp_size, device_mesh, ep_size) if given else None
    if axis is not None:
        same_random_state(axis)
    if axis is None:
        return cast(nn.Module, auto_class.from_config(config, **kwargs))
    model = together(axis, "from_config", lambda: cast(nn.Module, auto_class.from_config(config, **kwargs)))
    plan = tp_plan or "auto"
    return parallelize(model, axis, plan, ep_size=ep_size, overlap=overlap, sequence_parallel=sequence_parallel)


def _refuse_lone(overlap: bool, sequence_parallel: bool) -> None:
    if overlap:
        raise PlanError('overlap=True needs tensor parallelism, whose all-reduces it hides: give tp_plan="auto" too.')
    if sequence_parallel:
        raise PlanError('sequence_parallel=True needs ranks that share the sequence: give tp_plan="auto" too.')


def _refuse_other_ways(kwargs: dict[str, Any]) -> None:
    given = [name for name in _REFUSED if kwargs.get(name) is not None and kwargs[name] is not False]
    if given:
        reasons = dict.fromkeys(_REFUSED[name] for name in given)
        raise ShardwiseError(
            describe(
                f"from_pretrained({', '.join(given)}=..., tp_plan=...) is not possible.",
                why="; ".join(reasons),
                either=["leave it out, or", "leave tp_plan out"],
            )
        )


def _ordinary(auto_class: Any, path_or_id: str | os.PathLike[str], kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = auto_class.from_pretrained(path_or_id, **kwargs)
    return model


def _on_device(loaded: Any, device: torch.device) -> Any:
    """The model on the device, with its loading info where that was asked for."""
    return (loaded[0].to(device), *loaded[1:]) if isinstance(loaded, tuple) else loaded.to(device)


@dataclass
class _Request:
    """One call of `from_pretrained`, on one rank."""

    auto_class: Any
    path: str
    mesh: DeviceMesh
    ep: DeviceMesh
    tp_plan: PlanLike
    ep_size: int | None
    overlap: bool
    sequence_parallel: bool
    strict: bool
    seed: int
    keywords: dict[str, Any]

    def __post_init__(self) -> None:
        take = self.keywords.pop
        self.hub = {name: take(name) for name in _HUB_KEYWORDS if name in self.keywords}
        self.trust, self.variant = take("trust_remote_code", None), take("variant", None)
        self.dtype = take("dtype", None) or take("torch_dtype", None) or "auto"
        self.use_safetensors = take("use_safetensors", None)
        self.generation_config = take("generation_config", None)
        self.wants_info = take("output_loading_info", False)
        self.loading_info: dict[str, Any] = {}
        self.adapter: str | None = None
        self.adapter_name, self.adapter_kwargs = take("adapter_name", None), dict(take("adapter_kwargs", None) or {})
        if "token" in self.hub:
            self.adapter_kwargs.setdefault("token", self.hub["token"])
        self.fingerprint = ""

    def load(self) -> PreTrainedModel:
        """The model with this rank's shards. No collective: a rank that fails is heard in `together`."""
        self.adapter, self.path = adapter_and_base(self.path, **self.adapter_kwargs)
        given, rest = self._config()
        model_class, config = resolve_model_class(
            self.auto_class, given, path_or_id=self.path, trust_remote_code=self.trust, **self.hub
        )
        files = find_checkpoint(self.path, variant=self.variant, use_safetensors=self.use_safetensors, **self.hub)
        tensors = _opened(files, quantized := quantization(given))
        self._say_read_whole(model_class, read_whole(tensors))
        self.fingerprint = fingerprint(files)
        if quantized is not None:
            config = without_quantization(config)
            self._say_dequantized(model_class, quantized[0])
        model, self.loading_info = load_lazily(
            model_class, config, tensors, dtype=self.dtype, seed=self.seed, strict=self.strict, **rest
        )
        table = proven_plan(model, self.mesh.size(), self.tp_plan, self.ep_size)
        state = model_state(model, table, self.mesh, self.ep, self.overlap, self.sequence_parallel)
        apply_plan(model, state, _reader(state), ShardedModel.for_model(model))
        if self.generation_config is not None:
            model.generation_config = self.generation_config
        else:
            attach_generation_config(model, self.path, **self.hub)
        model.config.name_or_path = self.path
        _check_loaded(model)
        return model

    def _say_read_whole(self, model_class: type[PreTrainedModel], names: list[str]) -> None:
        if names and self.ep.get_local_rank() == 0:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            logging.get_logger(__name__).warning(
                f"{model_class.__name__}: {names[0]}{more} can't be mapped into memory (torch before 1.6 wrote it, or it is "
                "compressed), so each rank reads it whole. Saved again, with save_pretrained, each reads its part only."
            )

    def _say_dequantized(self, model_class: type[PreTrainedModel], method: str) -> None:
        if self.ep.get_local_rank() == 0:
            logging.get_logger(__name__).warning(
                f"{model_class.__name__}: the checkpoint is quantized ({method}). "
                "Its weights are dequantized while they are loaded, and are saved so."
            )

    def check_agreement(self, model: nn.Module) -> None:
        """Raise `MismatchError`, on every rank, when the ranks loaded different things. Collective."""
        facts = {
            **same_everywhere(model, required_state(model)),
            "the checkpoint": self.fingerprint,
            "the adapter": bool(self.adapter),
        }
        check_same(self.ep, "from_pretrained", facts, here=f"{type(model).__name__} from {self.path}")

    def _config(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """The config, and the keywords that it left over."""
        given = self.keywords.pop("config", None)
        if isinstance(given, PreTrainedConfig):
            return given, self.keywords
        kept = {name: self.keywords.pop(name) for name in _MODEL_KEYWORDS if name in self.keywords}
        config, rest = AutoConfig.from_pretrained(
            given or self.path, return_unused_kwargs=True, trust_remote_code=self.trust, **self.hub, **self.keywords
        )
        return config, {**rest, **kept}


def _reader(state: ModelState) -> Callable[[ShardSpec, Tensor], Tensor]:
    table, device = state.plan, local_device(state.mesh)
    quiet = state.ep.get_local_rank() > 0 or not logging.is_progress_bar_enabled()
    progress = tqdm(total=len(table), desc="Loading weights", disable=quiet)

    def read(row: ShardSpec, tensor: Tensor) -> Tensor:
        axis = state.axis_of(row)
        local = read_shard(row, tensor, axis.get_local_rank(), axis.size()).to(device)
        progress.update()
        if progress.n == len(table):
            progress.close()
        return local

    return read


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read this rank's shards of the checkpoint at `path` into a parallel transformers `model`, whose own it is. No collective.

    Raises `CheckpointError` for a checkpoint that does not fit.
    """
    state = required_state(model)
    tensors = _opened(find_checkpoint(path))
    lazily, _ = load_lazily(original_class(model), copy.deepcopy(model.config), tensors, dtype=model.dtype)  # type: ignore[arg-type]
    sources = dict((*lazily.named_parameters(remove_duplicate=False), *lazily.named_buffers()))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        row = state.row(name)
        if row is not None and isinstance(source := sources[row.name], LazyTensor):
            axis = state.axis_of(row)
            with torch.no_grad():
                tensor.copy_(read_shard(row, source, axis.get_local_rank(), axis.size()))


def load_dequantized(auto_class: Any, path: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The ordinary model of a quantized checkpoint, in one process: the weights that ranks would have parts of.

    Raises `CheckpointError` as `from_pretrained`.
    """
    tensors = _opened(find_checkpoint(path), quantization(config))
    weights = {key: read(tensor, tuple((0, length) for length in tensor.shape)) for key, tensor in tensors.items()}
    model_class, config = resolve_model_class(auto_class, config, path_or_id=path)
    model: PreTrainedModel = model_class.from_pretrained(
        None, config=without_quantization(config), state_dict=weights, dtype=dtype
    )
    attach_generation_config(model, path)
    return model


def _opened(files: CheckpointFiles, quantized: tuple[str, dict[str, Any]] | None = None) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint by their keys, as lazy ones; those of a `quantized` one (see `quantization`) dequantized."""
    tensors = open_checkpoint(files.files, files.index)
    return tensors if quantized is None else dequantized(tensors, *quantized)


def read_shard(row: ShardSpec, tensor: Tensor, rank: int, size: int) -> Tensor:
    """`rank`'s shard of a lazy (or real) tensor at full shape: a new CPU tensor of the row's dtype; only its own ranges are
    read.
    """
    if not isinstance(tensor, LazyTensor):
        return row.layout.shard(tensor.detach(), rank, size) if row.sharded else tensor.detach()
    full = tuple((0, length) for length in row.shape)
    cut = row.layout.cut(row.shape)
    if cut is None:
        local = torch.empty(row.shape, dtype=row.dtype, device="cpu")
        read_into(local, tensor, full)
        return local
    dim, pieces = cut[0], row.layout.pieces(row.shape, rank, size)
    local = torch.zeros(row.local_shape(rank, size), dtype=row.dtype, device="cpu")
    for piece in pieces:
        box = tuple((piece.full.start, piece.full.stop) if d == dim else r for d, r in enumerate(full))
        read_into(local.narrow(dim, piece.local.start, piece.local.stop - piece.local.start), tensor, box)
    return local


def _check_loaded(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, LazyTensor) or tensor.is_meta:
            raise ShardwiseError(
                f"{name} was left without data: please report this with the model's type, {type(model).__name__}."
            )


def _shared_seed(mesh: DeviceMesh) -> int:
    seed = torch.tensor([torch.initial_seed() % 2**62], device=local_device(mesh))
    dist.broadcast(seed, group=mesh.get_group(), group_src=0)
    return int(seed.item())
