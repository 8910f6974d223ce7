"""Encoders of texts, decoders with other heads, and encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from parity.seen import END, SIDE, Other, ids, noise
from shardwise.tiny.sizes import COMMON

LENGTH = 9
MASKED, SEQUENCE, TOKENS, ANSWERS = "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"
SEQ2SEQ = "Seq2SeqLM"
ALL = ("", MASKED, SEQUENCE, TOKENS, ANSWERS)
SOME = (MASKED, SEQUENCE)


def text(rows: int) -> dict[str, Tensor]:
    """Ids with an end inside, and a mask."""
    given = ids(rows, LENGTH)
    given[:, 5] = END
    mask = torch.ones_like(given)
    if rows > 2:
        mask[0, 6:] = 0
    return {"input_ids": given, "attention_mask": mask}


def on_a_page(rows: int) -> dict[str, Tensor]:
    """A text, each token of it in a box."""
    corner = ids(rows, LENGTH, 2, below=30)
    return text(rows) | {"bbox": torch.cat([corner, corner + 5], -1)}


def with_global(rows: int) -> dict[str, Tensor]:
    """A text of which the first token attends to all."""
    first = torch.zeros(rows, LENGTH, dtype=torch.long)
    first[:, 0] = 1
    return text(rows) | {"global_attention_mask": first}


def _t5(**more: object) -> Mapping[str, object]:
    sizes = {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}
    return {**sizes, "decoder_start_token_id": 0, **more}


DEBERTA = {"relative_attention": True, "max_relative_positions": 16, "type_vocab_size": 0}
DEBERTA_V2 = {
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "conv_kernel_size": 3,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
XLM = {"emb_dim": 64, "n_layers": 2, "n_heads": 4}
PAGE = {"max_2d_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "router_jitter_noise": 0.0, "expert_capacity": 64}
T5GEMMA = {
    "model_type": "t5_gemma_module",
    "attention_dropout": 0.0,
    **{
        field: COMMON[field]
        for field in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "sliding_window"),
        )
    },
}

ENCODERS: dict[str, Other] = {
    "albert": Other(text, ("", MASKED, SEQUENCE), {"embedding_size": 32}),
    "bert": Other(text, (*ALL, "MultipleChoice", "NextSentencePrediction", "PreTraining")),
    "big_bird": Other(text, (MASKED,), {"attention_type": "original_full"}),
    "bros": Other(lambda rows: text(rows) | {"bbox": noise(rows, LENGTH, 4).abs()}, ("",)),
    "camembert": Other(text, (MASKED,)),
    "canine": Other(
        lambda rows: {"input_ids": ids(rows, 16)},
        ("", SEQUENCE),
        {"num_hash_buckets": 64, "local_transformer_stride": 8, "downsampling_rate": 4, "upsampling_kernel_size": 4},
    ),
    "convbert": Other(text, (MASKED,), {"embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3}),
    "data2vec-text": Other(text, (MASKED,)),
    "deberta": Other(text, SOME, DEBERTA | {"pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": Other(text, ALL, DEBERTA | DEBERTA_V2 | {"pos_att_type": ["p2c", "c2p"]}),
    "distilbert": Other(text, (*ALL, "MultipleChoice")),
    "electra": Other(text, (*SOME, "PreTraining"), {"embedding_size": 32}),
    "ernie": Other(text, (MASKED,)),
    "esm": Other(
        text,
        (MASKED, SEQUENCE, TOKENS),
        {"pad_token_id": 1, "mask_token_id": 3, "position_embedding_type": "rotary", "token_dropout": False},
    ),
    "eurobert": Other(text, (MASKED, SEQUENCE, TOKENS)),
    "flaubert": Other(text, (SEQUENCE,), XLM),
    "fnet": Other(lambda rows: {"input_ids": ids(rows, LENGTH)}, (MASKED,), {"tpu_short_seq_length": LENGTH}),
    "funnel": Other(text, (MASKED,), {"block_sizes": [1, 1], "d_head": 16, "num_decoder_layers": 1}),
    "jina_embeddings_v3": Other(text, ("", MASKED, SEQUENCE)),
    "layoutlm": Other(on_a_page, (MASKED, TOKENS), PAGE),
    "layoutlmv3": Other(
        lambda rows: on_a_page(rows) | {"pixel_values": noise(rows, 3, SIDE, SIDE)},
        (SEQUENCE, TOKENS, ANSWERS),
        PAGE | {"coordinate_size": 8, "shape_size": 16, "input_size": SIDE, "patch_size": 14},
    ),
    "longformer": Other(with_global, (MASKED, SEQUENCE, TOKENS), {"attention_window": 4}),
    "luke": Other(text, (MASKED,), {"entity_vocab_size": 20, "entity_emb_size": 16}),
    "megatron-bert": Other(text, (MASKED,)),
    "mobilebert": Other(text, (MASKED,), {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32}),
    "modernbert": Other(
        text,
        ALL,
        {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2, "layer_types": None},
    ),
    "mpnet": Other(text, SOME),
    "nomic_bert": Other(text, ("", MASKED, SEQUENCE, TOKENS)),
    "nystromformer": Other(text, (MASKED,), {"num_landmarks": 64}),
    "rembert": Other(text, (MASKED,), {"input_embedding_size": 48, "output_embedding_size": 80}),
    "roberta": Other(text, (*SOME, ANSWERS)),
    "roberta-prelayernorm": Other(text, (MASKED,)),
    "roformer": Other(text, (MASKED,), {"embedding_size": 32}),
    "xlm": Other(text, (TOKENS,), XLM),
    "xlm-roberta": Other(text, ("", SEQUENCE, TOKENS)),
    "xlm-roberta-xl": Other(text, (MASKED,)),
    "xlnet": Other(text, (SEQUENCE,)),
    "xmod": Other(text, (MASKED,), {"languages": ["en_XX"], "default_language": "en_XX"}),
    "yoso": Other(text, (MASKED,), {"use_expectation": True, "use_fast_hash": False}),
}

WITH_OTHER_HEADS = (
    *("bloom", "deepseek_v3", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss"),
    *("llama", "mistral", "mixtral", "opt", "phi3", "qwen2_moe", "qwen3"),
)
TOKENS_TOO = ("gpt2", "llama", "qwen3")

DECODERS: dict[str, Other] = {
    name: Other(text, ("", SEQUENCE, TOKENS) if name in TOKENS_TOO else (SEQUENCE,)) for name in WITH_OTHER_HEADS
}

ENCODER_DECODERS: dict[str, Other] = {
    "bart": Other(text, ("", SEQ2SEQ, SEQUENCE, ANSWERS), decodes=True),
    "bigbird_pegasus": Other(text, (SEQ2SEQ,), {"attention_type": "original_full", "decoder_start_token_id": 0}),
    "blenderbot": Other(text, (SEQ2SEQ,)),
    "blenderbot-small": Other(text, (SEQ2SEQ,)),
    "fsmt": Other(
        text,
        (SEQ2SEQ,),
        {"src_vocab_size": 127, "tgt_vocab_size": 127, "langs": ["en", "de"], "decoder_start_token_id": 2},
    ),
    "led": Other(
        text,
        (SEQ2SEQ,),
        {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    ),
    "longt5": Other(text, (SEQ2SEQ,), _t5(local_radius=4, encoder_attention_type="local")),
    "m2m_100": Other(text, ("", SEQ2SEQ), decodes=True),
    "marian": Other(text, (SEQ2SEQ,), {"decoder_start_token_id": 0}),
    "mbart": Other(text, (SEQ2SEQ, SEQUENCE)),
    "mt5": Other(text, ("", SEQ2SEQ, SEQUENCE), _t5(**GATED), decodes=True),
    "mvp": Other(text, (SEQ2SEQ,)),
    "nllb-moe": Other(
        text, (SEQ2SEQ,), EXPERTS | {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "moe_token_dropout": 0.0}
    ),
    "pegasus": Other(text, (SEQ2SEQ,), {"decoder_start_token_id": 0}),
    "pegasus_x": Other(text, (SEQ2SEQ,), {"decoder_start_token_id": 0, "block_size": 4, "num_global_tokens": 2}),
    "plbart": Other(text, (SEQ2SEQ,)),
    "prophetnet": Other(
        text,
        (SEQ2SEQ,),
        {"num_buckets": 8, "relative_max_distance": 16, "disable_ngram_loss": True, "decoder_start_token_id": 0},
    ),
    "switch_transformers": Other(text, (SEQ2SEQ,), _t5(**EXPERTS, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)),
    "t5": Other(text, ("", SEQ2SEQ, SEQUENCE, TOKENS), _t5(), decodes=True),
    "t5gemma": Other(
        text,
        (SEQ2SEQ,),
        {"encoder": T5GEMMA, "decoder": T5GEMMA, "vocab_size": 127, "decoder_start_token_id": 1},
    ),
    "umt5": Other(text, (SEQ2SEQ, SEQUENCE), _t5(**GATED)),
}

TEXTS: dict[str, Other] = {**ENCODERS, **DECODERS, **ENCODER_DECODERS}
