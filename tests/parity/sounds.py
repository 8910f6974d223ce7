"""The wrappers that read sounds: their text models, towers and inputs."""

from __future__ import annotations

from parity.towers import Wrapper, feed

# For each of two rows 16 frames of 8 mel features.
FRAMES = (2, 8, 16)
ALL = [[1] * 16] * 2
WHISPER = {"max_source_positions": 8}
TWO, THREE, FOUR = (7,) * 2, (7,) * 3, (7,) * 4
MULTIMODAL, SPEECH, SEQ2SEQ = "AutoModelForMultimodalLM", "AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM"
masked = feed(input_features=FRAMES, input_features_mask=ALL)
CONFORMER = {
    "input_dim": 8,
    "num_layers": 1,
    "hidden_dim": 32,
    "dim_head": 16,
    "output_dim": 10,
    "context_size": 20,
    "max_pos_emb": 20,
    "conv_kernel_size": 3,
    "dropout": 0.0,
}
QFORMER = {"encoder_hidden_size": 32, "cross_attention_frequency": 1}

SOUNDS: dict[str, Wrapper] = {
    "audioflamingo3": Wrapper("qwen2", {"audio_config": ("audioflamingo3_encoder", WHISPER)}, FOUR, masked, auto=SEQ2SEQ),
    "fun_asr_nano": Wrapper(
        "qwen3",
        {
            "audio_config": (
                "fun_asr_nano_encoder",
                {"num_stacked_frames": 1, "num_timestamp_prediction_layers": 1, "fsmn_kernel_size": 3},
            )
        },
        FOUR,
        feed(input_features=(2, 4, 8), input_features_mask=[[1] * 4] * 2),
        {
            "adaptor_config": {
                "hidden_size": 64,
                "projector_hidden_size": 32,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "intermediate_size": 16,
            }
        },
        auto=SPEECH,
    ),
    "glmasr": Wrapper(
        "llama",
        {"audio_config": ("glmasr_encoder", {"intermediate_size": 128, "num_key_value_heads": 2})},
        TWO,
        masked,
        auto=MULTIMODAL,
    ),
    "granite_speech": Wrapper(
        "granite",
        {"encoder_config": ("granite_speech_encoder", CONFORMER), "projector_config": ("blip_2_qformer", QFORMER)},
        THREE,
        feed(input_features=(2, 15, 8)),
        {"has_lora_adapter": False},
        auto=SPEECH,
    ),
    "granite_speech_plus": Wrapper(
        "granite",
        {"encoder_config": ("granite_speech_plus_encoder", CONFORMER), "projector_config": ("blip_2_qformer", QFORMER)},
        THREE,
        feed(input_features=(2, 15, 8)),
        {"has_lora_adapter": False},
        auto=SPEECH,
    ),
    "moss_transcribe_diarize": Wrapper(
        "qwen3",
        {"audio_config": ("moss_transcribe_diarize_audio", WHISPER)},
        TWO,
        feed(input_features=FRAMES, input_features_mask=ALL, padding_mask=[[1] * 16] * 2),
        {"audio_chunk_size": 16},
        auto=MULTIMODAL,
    ),
    "musicflamingo": Wrapper("qwen2", {"audio_config": ("audioflamingo3_encoder", WHISPER)}, FOUR, masked, auto=SEQ2SEQ),
    "qwen2_audio": Wrapper(
        "qwen2",
        {"audio_config": ("qwen2_audio_encoder", WHISPER)},
        FOUR,
        feed(input_features=FRAMES, feature_attention_mask=ALL),
        auto=MULTIMODAL,
    ),
    "qwen3_asr": Wrapper(
        "qwen3",
        {"audio_config": ("qwen3_asr_encoder", {"output_dim": 64, "n_window_infer": 100, "downsample_hidden_size": 8})},
        (7,) * 13,
        feed(input_features=(2, 8, 100), input_features_mask=[[1] * 100] * 2),
        auto=MULTIMODAL,
    ),
    "voxtral": Wrapper(
        "llama",
        {"audio_config": ("voxtral_encoder", {**WHISPER, "intermediate_size": 128, "encoder_ffn_dim": 128})},
        TWO,
        feed(input_features=FRAMES),
        {"audio_token_id": 7},
        auto=MULTIMODAL,
    ),
}
