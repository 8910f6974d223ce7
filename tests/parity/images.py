"""The wrappers that read images as squares of pixels: their text models, towers and inputs."""

from __future__ import annotations

from parity.towers import CLIP, FOUR, ONE, PATCH, SIGLIP, Wrapper, feed
from shardwise.tiny.sizes import DENSE_THEN_SPARSE, INDEXER, LATENT

# For each of two rows an image.
pixels = feed(pixel_values=(2, 3, 28, 28))
typed_pixels = feed("token_type_ids", pixel_values=(2, 3, 28, 28))
large_pixels = feed(pixel_values=(2, 3, 64, 64))
sized_pixels = feed(pixel_values=(2, 3, 28, 28), image_sizes=[[28, 28]] * 2)
tiles = feed(pixel_values=(2, 1, 3, 28, 28))
whole_and_tile = feed(pixel_values=(2, 2, 3, 28, 28), image_sizes=[[28, 28]] * 2)

PIXTRAL = {"vision_config": ("pixtral", {"head_dim": 16})}
SAM = {"image_size": 64, "patch_size": 8, "output_channels": 32, "mlp_dim": 48, "window_size": 4, "global_attn_indexes": [1]}
SQUARE = {"image_size": [28, 28], "patch_size": [14, 14]}
TEN = (5,) * 10

IMAGES: dict[str, Wrapper] = {
    "aria": Wrapper(
        "aria_text", {"vision_config": ("idefics3_vision", {})}, FOUR, pixels, {"projector_patch_to_query_dict": {4: 4}}
    ),
    "aya_vision": Wrapper(
        "cohere2",
        SIGLIP,
        ONE,
        pixels,
        filled={"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    ),
    "blip-2": Wrapper(
        "opt",
        {
            "vision_config": ("blip_2_vision_model", {}),
            "qformer_config": ("blip_2_qformer", {"encoder_hidden_size": 32, "cross_attention_frequency": 1}),
        },
        FOUR,
        pixels,
        {"num_query_tokens": 4, "image_text_hidden_size": 16},
        reads_text=False,
    ),
    "cohere2_vision": Wrapper("cohere2", SIGLIP, ONE, pixels, {"alignment_intermediate_size": 64}),
    "deepseek_vl": Wrapper("llama", SIGLIP, FOUR, pixels),
    "deepseek_vl_hybrid": Wrapper(
        "llama",
        SIGLIP | {"high_res_vision_config": ("sam_vision_model", SAM)},
        FOUR,
        feed(pixel_values=(2, 3, 28, 28), high_res_pixel_values=(2, 3, 64, 64)),
    ),
    "emu3": Wrapper(
        "emu3_text_model",
        {
            "vq_config": (
                "emu3_vqgan",
                {
                    "codebook_size": 16,
                    "base_channels": 32,
                    "channel_multiplier": [1, 1],
                    "num_res_blocks": 1,
                    "attn_resolutions": [],
                },
            )
        },
        (),
        feed(),
        {"vocabulary_map": {"<image>": 5, **{f"<|visual token {i:06}|>": 20 + i for i in range(16)}}},
        filled={"vocabulary_map": {"<image>": 151643}},
    ),
    "fuyu": Wrapper("persimmon", {}, FOUR, feed(pixel_values=(2, 4, PATCH)), {"image_size": 28, "patch_size": 14}),
    "gemma3": Wrapper("gemma3_text", SIGLIP, FOUR, typed_pixels, {"mm_tokens_per_image": 4}),
    "gemma4_unified": Wrapper("gemma4_unified_text", {}, (), feed()),
    "got_ocr2": Wrapper("qwen2", {"vision_config": ("got_ocr2_vision", SAM)}, FOUR, large_pixels),
    "granite4_vision": Wrapper(
        "granite4_vision_text",
        {"vision_config": ("clip_vision_model", {"hidden_size": 64})}
        | {"qformer_config": ("blip_2_qformer", {"hidden_size": 64, "encoder_hidden_size": 64})},
        (5,) * 3,
        whole_and_tile,
        {
            "image_grid_pinpoints": [[28, 28]],
            "vision_feature_layer": -1,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [1, 2, 3, 4],
        },
        {"num_hidden_layers": 5},
        filled={"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]]},
    ),
    "granite_docling": Wrapper(
        "granite_docling_text",
        {
            "vision_config": (
                "granite_docling_vision",
                {"out_hidden_size": 64, "scale_factor": 2, "deepstack_visual_indexes": [0]},
            )
        },
        ONE,
        feed(pixel_values=(2, 1, 3, 28, 28), pixel_attention_mask=[[True]] * 2),
    ),
    "idefics2": Wrapper(
        "mistral",
        {
            "vision_config": ("idefics2_vision", {}),
            "perceiver_config": (
                "idefics2_perceiver",
                {
                    "hidden_size": 64,
                    "resampler_n_latents": 4,
                    "resampler_depth": 1,
                    "resampler_n_heads": 2,
                    "resampler_head_dim": 16,
                    "num_key_value_heads": 1,
                },
            ),
        },
        FOUR,
        tiles,
    ),
    "idefics3": Wrapper("llama", {"vision_config": ("idefics3_vision", {})}, ONE, tiles),
    "inkling_mm_model": Wrapper(
        "inkling_text",
        {
            "vision_config": ("inkling_vision", {"text_hidden_size": 64, "patch_size": 2, "n_layers": 3}),
            "audio_config": ("inkling_audio", {"text_hidden_size": 64, "n_mel_bins": 8, "mel_vocab_size": 16}),
        },
        ONE,
        feed(pixel_values=(2, 2, 2, 2, 3)),
    ),
    "internvl": Wrapper("qwen2", {"vision_config": ("internvl_vision", SQUARE)}, ONE, pixels),
    "janus": Wrapper(
        "llama",
        {
            "vision_config": ("janus_vision_model", {"projection_dim": 64, "num_image_tokens": 4}),
            "vq_config": (
                "janus_vqgan",
                {
                    "num_embeddings": 16,
                    "base_channels": 32,
                    "latent_channels": 32,
                    "channel_multiplier": [1, 1],
                    "num_res_blocks": 1,
                    "num_patches": 2,
                    "projection_dim": 64,
                    "image_token_embed_dim": 64,
                },
            ),
        },
        FOUR,
        pixels,
    ),
    "lighton_ocr": Wrapper("qwen3", PIXTRAL, ONE, sized_pixels),
    "llama4": Wrapper(
        "llama4_text",
        {
            "vision_config": (
                "llama4_vision_model",
                {
                    "vision_output_dim": 32,
                    "projector_input_dim": 32,
                    "projector_output_dim": 32,
                    "intermediate_size": 128,
                    "num_attention_heads": 4,
                },
            )
        },
        ONE,
        pixels,
    ),
    "llava": Wrapper("llama", CLIP, FOUR, pixels, {"vision_feature_layer": -1}),
    "llava_next": Wrapper("llama", CLIP, TEN, whole_and_tile, {"vision_feature_layer": -1, "image_grid_pinpoints": [[28, 28]]}),
    "llava_next_video": Wrapper(
        "llama", CLIP, TEN, whole_and_tile, {"vision_feature_layer": -1, "image_grid_pinpoints": [[28, 28]]}
    ),
    "llava_onevision": Wrapper("qwen2", SIGLIP, TEN, whole_and_tile, {"image_grid_pinpoints": [[28, 28]]}),
    "mistral3": Wrapper("mistral", PIXTRAL, ONE, sized_pixels),
    "mistral_large4": Wrapper("mistral_large4_text", PIXTRAL, ONE, sized_pixels, text_options={**LATENT, **INDEXER}),
    "ovis2": Wrapper(
        "qwen2",
        {"vision_config": ("ovis2_vision", {"vocab_size": 24})},
        FOUR,
        pixels,
        {"hidden_size": 64, "vocab_size": 127, "visual_indicator_token_ids": [10, 11, 12, 13, 14]},
    ),
    "paligemma": Wrapper("gemma", SIGLIP, FOUR, typed_pixels, {"projection_dim": 64}),
    "pp_chart2table": Wrapper("qwen2", {"vision_config": ("pp_chart2table_vision", SAM)}, FOUR, large_pixels),
    "qianfan_ocr": Wrapper("qwen3", {"vision_config": ("qianfan_ocr_vision", SQUARE)}, ONE, pixels),
    "smolvlm": Wrapper("llama", {"vision_config": ("smolvlm_vision", {})}, ONE, tiles),
    "step3p7": Wrapper(
        "step3p5",
        {"vision_config": ("step3p5_vision", {})},
        ONE,
        pixels,
        text_options=DENSE_THEN_SPARSE | {"share_expert_dim": 32},
    ),
    "video_llava": Wrapper("llama", CLIP, FOUR, feed(pixel_values_images=(2, 3, 28, 28)), {"vision_feature_layer": -1}),
    "vipllava": Wrapper("llama", CLIP, FOUR, pixels, {"vision_feature_layer": [-1, -2]}),
}
