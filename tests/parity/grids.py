"""The wrappers that read images as patches, in a grid of any shape: their text models, towers and inputs."""

from __future__ import annotations

from parity.towers import FOUR, ONE, PATCH, Wrapper, feed
from shardwise.tiny.sizes import INDEXER, LATENT

# For each of two rows 4 x 4 patches of 14 x 14, of which 2 x 2 are merged to a token; some are doubled in time.
GRID = [[1, 4, 4]] * 2
DOUBLED = 2 * PATCH
TYPES = "mm_token_type_ids"
untyped = feed(pixel_values=(32, DOUBLED), image_grid_thw=GRID)
patches = feed(TYPES, pixel_values=(32, DOUBLED), image_grid_thw=GRID)
typed_single = feed(TYPES, pixel_values=(32, PATCH), image_grid_thw=GRID)
strip = feed(pixel_values=(1, 3, 14, 14 * 32), target_sizes=[[4, 4]] * 2)

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
MROPE = {"rope_parameters": ROPE}
HALF_ROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
WINDOWS = {"window_size": 56, "fullatt_block_indexes": [1]}
QWEN2_5 = {"vision_config": ("qwen2_5_vl_vision", WINDOWS)}
DEEPSTACK = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}

GRIDS: dict[str, Wrapper] = {
    "cohere_compass": Wrapper("cohere_compass_text", {"vision_config": ("cohere_compass_vision", DEEPSTACK)}, FOUR, patches),
    "cosmos3_edge": Wrapper(
        "cosmos3_edge_text",
        {"vision_config": ("cosmos3_edge_vision", {"num_patches": 16})},
        FOUR,
        typed_single,
        {"projector_hidden_size": 64},
        MROPE,
    ),
    "cosmos3_omni": Wrapper(
        "qwen3_vl_text", {"vision_config": ("qwen3_vl_vision", DEEPSTACK)}, FOUR, patches, text_options=MROPE
    ),
    "dots3_note": Wrapper(
        "dots3_note_text",
        {
            "vision_config": (
                "dots3_note_vision_encoder",
                {
                    "moe_intermediate_size": 32,
                    "mlp_layer_types": ["dense", "sparse"],
                    "per_layer_config": {},
                    "num_local_experts": 4,
                    "adapter_in_dim": 32,
                    "adapter_out_dim": 64,
                },
            ),
            "audio_config": (
                "dots3_note_audio_encoder",
                {
                    "num_key_value_heads": 2,
                    "downsample_hidden_size": 8,
                    "head_dim": 16,
                    "adapter_input_size": 32,
                    "adapter_out_dim": 64,
                    "conv_output_size": 16,
                },
            ),
        },
        FOUR,
        feed(pixel_values=(32, PATCH), image_grid_thw=GRID),
    ),
    "ernie4_5_vl_moe": Wrapper(
        "ernie4_5_vl_moe_text",
        {"vision_config": ("ernie4_5_vl_moe_vision", {})},
        FOUR,
        typed_single,
        text_options={
            "moe_intermediate_size": [32, 32],
            "moe_num_experts": 4,
            "moe_k": 2,
            "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]},
        },
    ),
    "exaone4_5": Wrapper(
        "exaone4",
        {"vision_config": ("exaone4_5_vision", {"num_key_value_heads": 1, **WINDOWS})},
        FOUR,
        untyped,
    ),
    "gemma4": Wrapper(
        "gemma4_text",
        {
            "vision_config": (
                "gemma4_vision",
                {"num_key_value_heads": 1, "head_dim": 16, "pooling_kernel_size": 2, "position_embedding_size": 16},
            )
        },
        FOUR,
        feed(TYPES, pixel_values=(2, 16, PATCH), image_position_ids=[[[i % 4, i // 4] for i in range(16)]] * 2),
    ),
    "glm46v": Wrapper("glm4v_text", {"vision_config": ("glm4v_vision", {})}, FOUR, patches, text_options=MROPE),
    "glm4v": Wrapper("glm4v_text", {"vision_config": ("glm4v_vision", {})}, FOUR, patches, text_options=MROPE),
    "glm4v_moe": Wrapper("glm4v_moe_text", {"vision_config": ("glm4v_moe_vision", {})}, FOUR, patches, text_options=HALF_ROPE),
    "glm5_next": Wrapper(
        "glm5_next_text",
        {"vision_config": ("glm5_next_vision", {"projection_intermediate_size": 64})},
        FOUR,
        patches,
        text_options={
            **LATENT,
            **INDEXER,
            "linear_num_heads": 4,
            "linear_head_dim": 16,
            "hc_mult": 2,
            "index_kpool": 2,
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "glm_ocr": Wrapper("glm_ocr_text", {"vision_config": ("glm_ocr_vision", {})}, FOUR, patches, text_options=HALF_ROPE),
    "hyperclovax_vision_v2": Wrapper("hyperclovax", QWEN2_5, FOUR, untyped),
    "inkling2": Wrapper(
        "inkling2_text",
        {"vision_config": ("inkling2_vision", {"projection_hidden_dim": 32, "text_hidden_size": 64, "posemb_grid_size": 4})},
        FOUR,
        feed(pixel_values=(8, 28, 28, 3), image_grid_thw=[[1, 2, 2]] * 2),
    ),
    "kimi_k25": Wrapper(
        "deepseek_v3",
        {"vision_config": ("kimi_k25_vision", {"pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 1})},
        FOUR,
        feed(pixel_values=(32, 3, 14, 14), image_grid_thw=GRID),
        {"projection_hidden_size": 32},
    ),
    "lfm2_vl": Wrapper(
        "lfm2",
        {"vision_config": ("siglip2_vision_model", {"num_patches": 4, "vision_use_head": False})},
        ONE,
        feed(pixel_values=(2, 4, PATCH), spatial_shapes=[[2, 2]] * 2, pixel_attention_mask=[[1] * 4] * 2),
        {"projector_hidden_size": 32},
    ),
    "minicpm_ocr": Wrapper(
        "qwen3_5_text", {"vision_config": ("minicpm_ocr_vision", {"insert_layer_id": 0})}, FOUR, strip, {"insert_layer_id": 0}
    ),
    "minicpmv4_6": Wrapper(
        "qwen3_5_text", {"vision_config": ("minicpmv4_6_vision", {"insert_layer_id": 0})}, ONE, strip, {"insert_layer_id": 0}
    ),
    "minicpmv4_7": Wrapper(
        "qwen3_5_text",
        {"vision_config": ("minicpmv4_7_vision", {"insert_layer_id": 0})},
        ONE,
        feed(TYPES, pixel_values=(1, 3, 14, 14 * 32), target_sizes=[[4, 4]] * 2),
        {"insert_layer_id": 0},
    ),
    "minimax_m3_vl": Wrapper(
        "minimax_m3_vl_text",
        {"vision_config": ("minimax_m3_vl_vision", {})},
        FOUR,
        untyped,
        {"projector_hidden_size": 64, "merged_hidden_size": 256},
    ),
    "muse_glimmer": Wrapper(
        "muse_glimmer_text",
        {
            "vision_config": (
                "muse_glimmer_vision",
                {
                    "num_attention_heads": 4,
                    "pos_emb_height": 4,
                    "pos_emb_width": 4,
                    "layer_types": ["window_attention", "full_attention"],
                },
            )
        },
        FOUR,
        untyped,
        {"out_hidden_size": 128, "projector_hidden_size": 32},
    ),
    "nemotron_h_omni": Wrapper(
        "nemotron_h",
        {"vision_config": ("radio", {"max_img_size": 56, "video_temporal_patch_size": 2, "patch_dim": PATCH})},
        FOUR,
        feed(pixel_values=(32, PATCH), image_grid_hw=[[4, 4]] * 2),
        {"projector_hidden_size": 32, "vision_hidden_size": 32},
    ),
    "paddleocr_vl": Wrapper(
        "paddleocr_vl_text",
        {"vision_config": ("paddleocr_vl_vision", {})},
        FOUR,
        feed(TYPES, pixel_values=(32, 3, 14, 14), image_grid_thw=GRID),
        text_options=MROPE,
    ),
    "qwen2_5_omni_thinker": Wrapper(
        "qwen2_5_omni_text",
        {
            "vision_config": ("qwen2_5_omni_vision_encoder", {**WINDOWS}),
            "audio_config": ("qwen2_5_omni_audio_encoder", {"output_dim": 64}),
        },
        FOUR,
        untyped,
        {"vision_start_token_id": 8},
        MROPE,
    ),
    "qwen2_5_vl": Wrapper("qwen2_5_vl_text", QWEN2_5, FOUR, patches, text_options=MROPE),
    "qwen2_vl": Wrapper(
        "qwen2_vl_text", {"vision_config": ("qwen2_vl_vision", {"hidden_size": 64})}, FOUR, patches, text_options=MROPE
    ),
    "qwen3_5": Wrapper("qwen3_5_text", {"vision_config": ("qwen3_5_vision", {"num_position_embeddings": 16})}, FOUR, patches),
    "qwen3_5_moe": Wrapper(
        "qwen3_5_moe_text", {"vision_config": ("qwen3_5_moe_vision", {"num_position_embeddings": 16})}, FOUR, patches
    ),
    "qwen3_omni_moe_thinker": Wrapper(
        "qwen3_omni_moe_text",
        {
            "vision_config": ("qwen3_omni_moe_vision_encoder", DEEPSTACK),
            "audio_config": ("qwen3_omni_moe_audio_encoder", {"output_dim": 64, "downsample_hidden_size": 8}),
        },
        FOUR,
        untyped,
        {"vision_start_token_id": 8},
        MROPE,
    ),
    "qwen3_vl": Wrapper("qwen3_vl_text", {"vision_config": ("qwen3_vl_vision", DEEPSTACK)}, FOUR, patches, text_options=MROPE),
    "qwen3_vl_moe": Wrapper(
        "qwen3_vl_moe_text", {"vision_config": ("qwen3_vl_moe_vision", DEEPSTACK)}, FOUR, patches, text_options=MROPE
    ),
    "qwen4_exp": Wrapper(
        "qwen4_exp_text", {"vision_config": ("qwen4_exp_vision", {"num_position_embeddings": 16})}, FOUR, patches
    ),
    "video_llama_3": Wrapper(
        "qwen2",
        {"vision_config": ("video_llama_3_vision", {})},
        FOUR,
        feed(pixel_values=(32, PATCH), image_grid_thw=GRID, image_merge_sizes=[2, 2]),
    ),
}
