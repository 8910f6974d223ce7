"""The attention weights that a parallel model was asked for (`output_attentions=True`): each rank has those of its own heads,
and the caller gets all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from shardwise.collectives import gather_from_tp
from shardwise.errors import ShardwiseError, describe
from shardwise.mesh import local_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_ENCODER = ("encoder_attention_heads", "num_encoder_attention_heads", "num_attention_heads")
_DECODER = ("decoder_attention_heads", "num_decoder_attention_heads", "num_attention_heads")
_COUNTS = {
    "attentions": ("num_attention_heads",),
    "encoder_attentions": _ENCODER,
    **dict.fromkeys(("decoder_attentions", "cross_attentions", "ngram_attentions", "decoder_ngram_attentions"), _DECODER),
}
"""Which field of a config says how many heads these have: the first that is there."""
_BLOCKS = {"diffllama": 2}
"""Types whose ranks have so many blocks of neighbouring heads, where the others have one."""


def attentions_are_asked_for(config: PreTrainedConfig, keywords: dict[str, Any]) -> bool:
    """Whether a forward with these keywords returns attention weights."""
    asked = keywords.get("output_attentions")
    return bool(getattr(config, "output_attentions", False) if asked is None else asked)


@torch.compiler.disable(reason="the ranks tell each other how many heads they have")  # type: ignore[untyped-decorator]
def gather_attentions(output: Any, config: PreTrainedConfig, mesh: DeviceMesh) -> None:
    """Put the weights of all heads into `output`, in place of this rank's, in each tensor (batch, heads, queries, keys), or
    (batch, n-gram, heads, queries, keys). Collective.

    Weights that every rank has for all heads stay as they are. Raises `ShardwiseError` where it can't be told whose they are.
    """
    found = [(key, index, tensor) for key in _COUNTS for index, tensor in _weights(output, key)]
    if not found:
        return
    lengths = torch.tensor([tensor.shape[-3] for _, _, tensor in found], device=local_device(mesh))
    each = [torch.empty_like(lengths) for _ in range(mesh.size())]
    dist.all_gather(each, lengths, group=mesh.get_group())
    whole = {key: list(output[key]) for key, _, _ in found}
    for (key, index, tensor), sizes in zip(found, torch.stack(each).T.tolist(), strict=True):
        if _are_parts(key, sizes, _heads(config, key)):
            whole[key][index] = _gather(tensor, mesh, sizes, _BLOCKS.get(config.model_type, 1))
    for key, tensors in whole.items():
        output[key] = tuple(tensors)


def _gather(local: Tensor, mesh: DeviceMesh, sizes: list[int], blocks: int) -> Tensor:
    lengths = tuple(size // blocks for size in sizes)
    return torch.cat([gather_from_tp(block, mesh, -3, lengths) for block in local.chunk(blocks, -3)], -3)


def _weights(output: Any, key: str) -> Iterator[tuple[int, Tensor]]:
    """The attention weights that `output` has under `key`, by their place there."""
    values = output.get(key) if isinstance(output, ModelOutput) else None
    for index, value in enumerate(values or ()):
        if isinstance(value, Tensor) and value.dim() >= 4:
            yield index, value


def _heads(config: PreTrainedConfig, key: str) -> set[int]:
    """How many heads an attention layer may have: layers of some types differ."""
    text = config.get_text_config() if key == "attentions" else config
    named = next((getattr(text, name) for name in _COUNTS[key] if getattr(text, name, None) is not None), None)
    others = [value for name, value in vars(text).items() if name.endswith("attention_heads")] if key == "attentions" else []
    counts: set[int] = set()
    for value in (named, *others):
        counts |= set(value) if isinstance(value, list | tuple) else {value} if isinstance(value, int) else set()
    return counts


def _are_parts(key: str, sizes: list[int], heads: set[int]) -> bool:
    """Whether the ranks have `sizes` of the heads each, and not all of them every one."""
    parts, whole = sum(sizes) in heads, len(set(sizes)) == 1 and sizes[0] in heads
    if parts == whole:
        raise ShardwiseError(
            describe(
                f"output_attentions: whose heads are the {key} of the ranks, {sizes} of them?",
                config=f"{sorted(heads)} heads",
                either=["leave output_attentions out, or", "shardwise.unparallelize(model), and ask the ordinary model"],
            )
        )
    return parts
