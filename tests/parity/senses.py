"""Models of images, videos and sounds, and of these beside texts, that have no text model with a plan of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from parity.seen import CLASSES, SIDE, Other, ids, noise
from parity.texts import LENGTH, text

PICTURES, SOUNDS, VIDEOS = "ImageClassification", "AudioClassification", "VideoClassification"
PATCH = 14


def image(rows: int, side: int = SIDE) -> dict[str, Tensor]:
    """Square images of three channels."""
    return {"pixel_values": noise(rows, 3, side, side)}


def video(rows: int) -> dict[str, Tensor]:
    """Two frames."""
    return {"pixel_values": noise(rows, 2, 3, SIDE, SIDE)}


def captioned(rows: int) -> dict[str, Tensor]:
    """Images, each with a text."""
    return text(rows) | image(rows)


def in_patches(rows: int) -> dict[str, Tensor]:
    """Texts, and images as four patches each."""
    grid = {"pixel_attention_mask": torch.ones(rows, 4, dtype=torch.long), "spatial_shapes": torch.full((rows, 2), 2)}
    return text(rows) | {"pixel_values": noise(rows, 4, 3 * PATCH**2)} | grid


IMAGE: dict[str, object] = {"image_size": SIDE, "patch_size": PATCH}
SPEECH: dict[str, object] = {
    "conv_dim": [16, 16],
    "conv_kernel": [5, 3],
    "conv_stride": [3, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 31,
    "classifier_proj_size": 32,
    "mask_time_prob": 0.0,
    "ctc_loss_reduction": "mean",
}
WHISPER: dict[str, object] = {
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 40,
    "decoder_start_token_id": 1,
    "classifier_proj_size": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
SHIFTED: dict[str, object] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
SMALL: dict[str, object] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
READ = {"vocab_size": 127, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CAPTION: Mapping[str, object] = {**SMALL, **READ, **UNDROPPED, "num_attention_heads": 4}
PICTURE: Mapping[str, object] = {**SMALL, **IMAGE, "num_attention_heads": 2}
BOTH: Mapping[str, object] = {"text_config": CAPTION, "vision_config": PICTURE, "projection_dim": 32}
STAGES: dict[str, object] = {
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "num_attention_heads": [2, 4],
    "num_encoder_blocks": 2,
    "sr_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 32,
}

HEARD: dict[str, Other] = {
    "audio-spectrogram-transformer": Other(
        lambda rows: {"input_values": noise(rows, 32, 16)},
        ("", SOUNDS),
        {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    ),
    **{
        name: Other(lambda rows: {"input_values": noise(rows, 400)}, ("CTC", SOUNDS), SPEECH)
        for name in ("hubert", "sew", "unispeech", "unispeech-sat")
    },
    "speech_to_text": Other(
        lambda rows: {"input_features": noise(rows, 32, 8)},
        ("SpeechSeq2Seq",),
        {
            "input_feat_per_channel": 8,
            "conv_channels": 32,
            "max_source_positions": 40,
            "max_target_positions": 40,
            "decoder_start_token_id": 1,
        },
    ),
    "wav2vec2": Other(lambda rows: {"input_values": noise(rows, 400)}, ("", "CTC", SOUNDS), SPEECH),
    "whisper": Other(lambda rows: {"input_features": noise(rows, 8, 32)}, ("", "SpeechSeq2Seq", SOUNDS), WHISPER, decodes=True),
}

SEEN: dict[str, Other] = {
    **{name: Other(image, ("", PICTURES), IMAGE) for name in ("beit", "dinov2", "dinov2_with_registers", "ijepa", "vit")},
    **{name: Other(image, (PICTURES,), IMAGE) for name in ("data2vec-vision", "vit_msn")},
    **{name: Other(image, ("",), IMAGE) for name in ("clip_vision_model", "siglip_vision_model")},
    **{
        name: Other(lambda rows: image(rows, 32), (PICTURES,), {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2})
        for name in ("convnext", "convnextv2")
    },
    "deit": Other(image, ("", PICTURES), IMAGE | {"architectures": ["DeiTForImageClassification"]}),
    "dinov3_vit": Other(image, ("",), IMAGE | {"num_register_tokens": 2}),
    "dpt": Other(
        image,
        ("DepthEstimation",),
        IMAGE
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
            "is_hybrid": False,
        },
    ),
    "segformer": Other(lambda rows: image(rows, 32), (PICTURES, "SemanticSegmentation"), STAGES),
    **{name: Other(lambda rows: image(rows, 32), (PICTURES,), SHIFTED) for name in ("swin", "swinv2")},
    "timesformer": Other(video, (VIDEOS,), IMAGE | {"num_frames": 2}),
    "videomae": Other(video, (VIDEOS,), IMAGE | {"num_frames": 2, "tubelet_size": 2, "patch_size": 7}),
    "yolos": Other(
        lambda rows: image(rows, 32), ("ObjectDetection",), {"image_size": [32, 32], "patch_size": 8, "num_labels": CLASSES}
    ),
}

READ_AND_SEEN: dict[str, Other] = {
    "altclip": Other(captioned, ("",), {**BOTH, "text_config": {**CAPTION, "project_dim": 32}}),
    "blip": Other(captioned, ("", "ImageTextToText"), BOTH),
    "chinese_clip": Other(captioned, ("",), BOTH),
    "clap": Other(
        lambda rows: text(rows) | {"input_features": noise(rows, 1, 64, 16)},
        ("",),
        {
            "text_config": CAPTION,
            "audio_config": {
                "spec_size": 32,
                "hidden_size": 32,
                "patch_size": 4,
                "patch_stride": [4, 4],
                "num_mel_bins": 16,
                "depths": [1, 1],
                "num_attention_heads": [2, 2],
                "window_size": 4,
                "patch_embeds_hidden_size": 16,
                "drop_path_rate": 0.0,
                "num_hidden_layers": 2,
            },
            "projection_dim": 32,
        },
    ),
    "clip": Other(captioned, ("",), BOTH),
    "clipseg": Other(
        captioned,
        ("",),
        {**BOTH, "extract_layers": [0, 1], "reduce_dim": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32},
    ),
    "owlvit": Other(
        lambda rows: (
            {"input_ids": ids(rows, LENGTH), "attention_mask": torch.ones(rows, LENGTH, dtype=torch.long)} | image(rows)
        ),
        ("",),
        BOTH,
    ),
    "siglip": Other(captioned, ("",), BOTH),
    "siglip2": Other(in_patches, ("",), {**BOTH, "vision_config": {**PICTURE, "num_patches": 4}}),
}

SENSES: dict[str, Other] = {**HEARD, **SEEN, **READ_AND_SEEN}
