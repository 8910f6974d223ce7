"""A model that is in no release of transformers: what the code of a repository looks like, loaded with `trust_remote_code`.

Copied into a folder beside a config.json, so it imports nothing of this project. Options of its config choose what is written
as some repositories write it: linear layers of their own, learned positions with an offset, a loss of the head's weight.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

OFFSET = 2


class CustomConfig(PreTrainedConfig):
    """Its options: see the classes that read them."""

    model_type = "custom_code"

    def __init__(self, **given: Any) -> None:
        sizes = {"vocab_size": 101, "hidden_size": 48, "heads": 6, "inner": 80, "num_hidden_layers": 2, "positions": 40}
        options = {"linear": "bias", "learned_positions": False, "chunked_loss": False, "mixed": False, "plan": None}
        for name, value in {**sizes, **options}.items():
            setattr(self, name, given.pop(name, value))
        self.base_model_tp_plan = self.plan
        super().__init__(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, **given})


class BiasLinear(nn.Module):
    """A linear layer that hands its bias to the product."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(outputs, inputs)), nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class KernelLinear(nn.Module):
    """A linear layer that shapes its output by numbers of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.kernel = nn.Parameter(torch.empty(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.inputs).mm(self.kernel).view(*x.shape[:-1], self.outputs)


LINEAR: dict[str, Any] = {"bias": BiasLinear, "kernel": KernelLinear, "torch": nn.Linear}


class Attention(nn.Module):
    """Of queries, keys and values that are fused."""

    def __init__(self, config: CustomConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.width = layer, config.heads, config.hidden_size
        self.fused = LINEAR[config.linear](self.width, 3 * self.width)
        self.out = LINEAR[config.linear](self.width, self.width)

    def forward(self, x: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.fused(x).split(self.width, -1))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        attended: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return attended


class Block(nn.Module):
    """Attention and an MLP; `mixed`: how much of each is told by a vector that is multiplied with."""

    def __init__(self, config: CustomConfig, layer: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size) for _ in range(2))
        self.attention = Attention(config, layer)
        self.up = LINEAR[config.linear](config.hidden_size, config.inner)
        self.down = LINEAR[config.linear](config.inner, config.hidden_size)
        self.mix = nn.Parameter(torch.empty(config.hidden_size)) if config.mixed else None

    def forward(self, x: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        h = self.norms[0](x)
        attended = self.attention(h, mask, cache)
        x = x + (attended if self.mix is None else attended * (h @ self.mix).sigmoid()[..., None])
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class LearnedPositions(nn.Embedding):
    """Rows of which the first are kept for something else, as in OPT."""

    def forward(self, positions: Tensor) -> Tensor:
        return super().forward(positions + OFFSET)


class CustomPreTrainedModel(PreTrainedModel):
    """What both have in common."""

    config_class = CustomConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.2)


class CustomModel(CustomPreTrainedModel):
    """Ids to states."""

    def __init__(self, config: CustomConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.positions = LearnedPositions(config.positions + OFFSET, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: DynamicCache | None = None, **_: Any
    ) -> BaseModelOutputWithPast:
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        places = torch.arange(past, past + input_ids.shape[1])
        mask = (torch.arange(past + len(places)) <= places[:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool()
        x = self.embed_tokens(input_ids)
        x = x + self.positions(places) if self.config.learned_positions else x
        for layer in self.layers:
            x = layer(x, torch.zeros(mask.shape).masked_fill(~mask, -1e9), past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class CustomForCausalLM(CustomPreTrainedModel, GenerationMixin):
    """States to logits, and a loss, which may be computed by the head's weight, a few tokens at a time."""

    def __init__(self, config: CustomConfig) -> None:
        super().__init__(config)
        self.model = CustomModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **given: Any) -> CausalLMOutputWithPast:
        found = self.model(input_ids, **given)
        logits, loss = self.lm_head(found.last_hidden_state), None
        if labels is not None and self.config.chunked_loss:
            states, wanted = found.last_hidden_state[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            chunks = zip(states.split(7), wanted.split(7), strict=True)
            sums = [F.cross_entropy(x @ self.lm_head.weight.t(), y, reduction="sum") for x, y in chunks]
            loss = torch.stack(sums).sum() / len(wanted)
        elif labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=found.past_key_values)
