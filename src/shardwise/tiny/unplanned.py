"""What the config of a tiny model says of the types that have no plan, neither transformers' nor ours: theirs is inferred."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from shardwise.tiny.sizes import NO_DROPOUT

UNPLANNED: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "cpmant": {"dim_head": 16, "prompt_types": 4, "prompt_length": 4, "segment_types": 4},
        "mllama_text_model": {"cross_attention_layers": [1], "architectures": ["MllamaForCausalLM"]},
        "musicgen_decoder": NO_DROPOUT | {"num_codebooks": 2, "architectures": ["MusicgenForCausalLM"]},
        "musicgen_melody_decoder": NO_DROPOUT | {"num_codebooks": 2, "architectures": ["MusicgenMelodyForCausalLM"]},
        "reformer": {
            "is_decoder": True,
            "attn_layers": ["local", "lsh"],
            "attention_head_size": 16,
            "feed_forward_size": 96,
            "axial_pos_embds": False,  # which can be trained on one length alone
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 4,
            "hash_seed": 0,
            "hidden_dropout_prob": 0.0,
            "local_attention_probs_dropout_prob": 0.0,
        },
        "rembert": {"input_embedding_size": 48, "output_embedding_size": 80},
        "roc_bert": {
            "shape_embed_dim": 32,
            "shape_vocab_size": 127,
            "pronunciation_embed_dim": 32,
            "pronunciation_vocab_size": 60,
        },
        "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
    }
)
