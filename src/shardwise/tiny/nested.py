"""Types whose config has configs of parts inside: a text model with towers, or a model made of several."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PARTS: Mapping[str, str] = MappingProxyType(
    {
        "dots3_note": "dots3_note_text",
        "emu3": "emu3_text_model",
        "mllama": "mllama_text_model",
        "musicgen": "musicgen_decoder",
        "musicgen_melody": "musicgen_melody_decoder",
        "qwen3_5": "qwen3_5_text",
        "qwen3_5_moe": "qwen3_5_moe_text",
        "qwen4_exp": "qwen4_exp_text",
    }
)
"""Of types whose causal-LM class is that of a part: the part."""

TOWER: Mapping[str, object] = MappingProxyType(
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "mlp_dim": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
)
"""Of the fields that the config of a tower has."""

_BYTES: dict[str, object] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96}
_IDS: dict[str, object] = {"image_token_id": 5, "video_token_id": 6, "audio_token_id": 7}

NESTED: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "blt": {
            "vocab_size": 127,
            "max_position_embeddings": 64,
            "local_attention_window_len": 8,
            "encoder_hash_byte_group_size": [2, 3],
            "encoder_hash_byte_group_vocab": 50,
            "patching_threshold": 4.8,  # of the entropy of 127 bytes
            "patcher_config": ("blt_patcher", _BYTES | {"vocab_size": 127, "num_hidden_layers": 1}),
            "encoder_config": ("blt_local_encoder", _BYTES | {"hidden_size_global": 96, "num_hidden_layers": 1}),
            "decoder_config": ("blt_local_decoder", _BYTES | {"hidden_size_global": 96, "num_hidden_layers": 1}),
            "global_config": ("blt_global_transformer", _BYTES | {"hidden_size": 96, "num_hidden_layers": 1}),
        },
        "fuyu": {"text_config": ("persimmon", {}), "patch_size": 4, "image_size": 28, "image_token_id": 5},
        "gemma3": {
            "text_config": ("gemma3_text", {}),
            "vision_config": ("siglip_vision_model", {"vision_use_head": False}),
            "image_token_index": 5,
            "mm_tokens_per_image": 4,
        },
        "gemma3n": {
            "text_config": ("gemma3n_text", {}),
            "vision_config": ("gemma3n_vision", {"architecture": "mobilenetv5_base", "vocab_offset": 100, "vocab_size": 8}),
            "audio_config": (
                "gemma3n_audio",
                {"conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "vocab_offset": 110, "vocab_size": 8},
            ),
            **{key: _IDS[key] for key in ("image_token_id", "audio_token_id")},
        },
        "gemma4": {
            "text_config": ("gemma4_text", {}),
            "vision_config": ("gemma4_vision", {"head_dim": 16, "pooling_kernel_size": 2, "position_embedding_size": 16}),
            **_IDS,
        },
        "gemma4_assistant": {
            "text_config": ("gemma4_text", {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}),
            "backbone_hidden_size": 80,
        },
        "gemma4_unified": {
            "text_config": ("gemma4_unified_text", {}),
            "vision_config": (
                "gemma4_unified_vision",
                {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32, "pooling_kernel_size": 2},
            ),
            "audio_config": ("gemma4_unified_audio", {"audio_embed_dim": 32}),
            **_IDS,
        },
        "gemma4_unified_assistant": {"text_config": ("gemma4_unified_text", {}), "backbone_hidden_size": 80},
        "git": {"vision_config": ("git_vision_model", {})},
        "got_ocr2": {
            "text_config": ("qwen2", {}),
            "vision_config": (
                "got_ocr2_vision",
                {"image_size": 64, "patch_size": 8, "output_channels": 32, "window_size": 4, "global_attn_indexes": [0]},
            ),
            "image_token_index": 5,
        },
        "llama4": {
            "text_config": ("llama4_text", {"moe_layers": None, "interleave_moe_layer_step": 2}),
            "vision_config": (
                "llama4_vision_model",
                {"intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
            ),
        },
        "moss_transcribe_diarize": {
            "text_config": ("qwen3", {}),
            "audio_config": ("moss_transcribe_diarize_audio", {"num_mel_bins": 8, "max_source_positions": 64}),
            "audio_token_id": 7,
        },
    }
)
"""What the configs say; a part is its type, and what it says besides the sizes in `TINY`, or in `TOWER`."""
