"""What `tp_plan="auto"` is asked for besides causal LMs and wrappers: encoders, encoder-decoders, towers alone, with any head.

Each is a type and an Auto class ("bert MaskedLM" stands for `AutoModelForMaskedLM` of a BertConfig), tiny, with two micro-batches:
the second is another number of rows, of texts padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from parity.job import Subject
from shardwise import tiny

Feed = dict[str, Tensor]

VOCABULARY, CLASSES, LENGTH = 127, 3, 9
BARE = "Model"


def draw(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int, seed: int = 7, low: int = 10, high: int = VOCABULARY) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def text(rows: int, **more: Tensor) -> Feed:
    """Ids and a mask; the last tokens of the first row are padding, where there are more rows than two."""
    given = ids(rows, LENGTH, seed=rows)
    given[:, 5] = 2
    mask = torch.ones_like(given)
    if rows > 2:
        mask[0, 6:] = 0
    return {"input_ids": given, "attention_mask": mask, **more}


def image(rows: int, side: int = 28) -> Feed:
    return {"pixel_values": draw(rows, 3, side, side, seed=rows)}


def sound(rows: int, length: int = 400) -> Feed:
    return {"input_values": draw(rows, length, seed=rows)}


def spectrum(rows: int, bands: int = 8, length: int = 32) -> Feed:
    return {"input_features": draw(rows, bands, length, seed=rows)}


def captioned(rows: int) -> Feed:
    return text(rows) | image(rows)


def boxed(rows: int) -> Feed:
    corner = ids(rows, LENGTH, 2, low=0, high=30)
    return text(rows, bbox=torch.cat([corner, corner + 5], -1))


def labels_of(task: str, feed: Feed, rows: int) -> Feed:
    """The labels of a task."""
    first = feed.get("input_ids")
    if task in ("SequenceClassification", "ImageClassification", "AudioClassification", "VideoClassification"):
        return {"labels": ids(rows, low=0, high=CLASSES)}
    if task == "TokenClassification":
        return {"labels": ids(rows, LENGTH, low=0, high=CLASSES)}
    if task in ("MaskedLM", "Seq2SeqLM", "ImageTextToText", "CausalLM", "SpeechSeq2Seq"):
        return {"labels": first if first is not None else ids(rows, LENGTH)}
    if task == "QuestionAnswering":
        return {"start_positions": ids(rows, low=0, high=4), "end_positions": ids(rows, low=4, high=6)}
    if task == "CTC":
        return {"labels": ids(rows, 4, low=1, high=30)}
    if task == "MultipleChoice":
        return {"labels": ids(rows, low=0, high=2)}
    if task == "NextSentencePrediction":
        return {"labels": ids(rows, low=0, high=2)}
    if task == "SemanticSegmentation":
        return {"labels": ids(rows, 28, 28, low=0, high=CLASSES)}
    return {}


IMAGE: dict[str, object] = {"image_size": 28, "patch_size": 14, "num_labels": CLASSES}
SPEECH: dict[str, object] = {
    "conv_dim": [16, 16], "conv_kernel": [5, 3], "conv_stride": [3, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "vocab_size": 31, "num_labels": CLASSES,
    "classifier_proj_size": 32, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "apply_spec_augment": False,
    "ctc_zero_infinity": True, "layerdrop": 0.0,
}
PLAIN = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "num_labels": CLASSES}
T5: dict[str, object] = {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0, "num_labels": CLASSES}
TOW = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 127, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DUAL: dict[str, object] = {"text_config": TXT, "vision_config": TOW, "projection_dim": 32}

HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", BARE)
T = text
# type: (feed, options, tasks)
TABLE: dict[str, tuple[Callable[[int], Feed], Mapping[str, object], tuple[str, ...]]] = {
    "bert": (T, {}, (*HEADS, "MultipleChoice", "NextSentencePrediction", "PreTraining")),
    "roberta": (T, {}, HEADS),
    "xlm-roberta": (T, {}, HEADS),
    "xlm-roberta-xl": (T, {}, HEADS),
    "camembert": (T, {}, HEADS),
    "deberta": (T, {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16, "type_vocab_size": 0}, HEADS),
    "deberta-v2": (T, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True, "type_vocab_size": 0, "position_biased_input": False, "conv_kernel_size": 3}, HEADS),
    "distilbert": (T, {}, (*HEADS, "MultipleChoice")),
    "albert": (T, {"embedding_size": 32}, HEADS),
    "modernbert": (T, {"layer_types": None, "global_attn_every_n_layers": 2, "local_attention": 8, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}, HEADS),
    "electra": (T, {"embedding_size": 32}, (*HEADS, "PreTraining")),
    "mpnet": (T, {}, HEADS),
    "nomic_bert": (T, {}, HEADS),
    "eurobert": (T, {}, HEADS),
    "jina_embeddings_v3": (T, {}, (BARE, "MaskedLM", "SequenceClassification")),
    "esm": (T, {"pad_token_id": 1, "mask_token_id": 3, "position_embedding_type": "rotary", "token_dropout": False}, ("MaskedLM", "SequenceClassification", "TokenClassification", BARE)),
    "longformer": (lambda n: text(n) | {"global_attention_mask": torch.zeros(n, LENGTH, dtype=torch.long).index_fill(1, torch.tensor([0]), 1)}, {"attention_window": 4}, HEADS),
    "funnel": (T, {"block_sizes": [1, 1], "n_head": 4, "d_head": 16, "d_model": 64, "d_inner": 96, "num_decoder_layers": 1, "decoder_layers": 1}, (*HEADS, "PreTraining")),
    "big_bird": (T, {"attention_type": "original_full"}, HEADS),
    "roformer": (T, {"embedding_size": 32}, HEADS),
    "rembert": (T, {"input_embedding_size": 48, "output_embedding_size": 80}, HEADS),
    "convbert": (T, {"embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3}, HEADS),
    "squeezebert": (T, {"embedding_size": 64}, HEADS),
    "mobilebert": (T, {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32}, HEADS),
    "fnet": (lambda n: {"input_ids": ids(n, LENGTH, seed=n)}, {"tpu_short_seq_length": LENGTH}, HEADS),
    "nystromformer": (T, {"num_landmarks": 64, "max_position_embeddings": 64}, HEADS),
    "yoso": (T, {"use_expectation": True, "use_fast_hash": False}, HEADS),
    "megatron-bert": (T, {}, HEADS),
    "ibert": (T, {}, HEADS),
    "data2vec-text": (T, {}, HEADS),
    "ernie": (T, {}, HEADS),
    "xmod": (T, {"languages": ["en_XX"], "default_language": "en_XX"}, HEADS),
    "roberta-prelayernorm": (T, {}, HEADS),
    "xlnet": (T, {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96}, ("SequenceClassification", "TokenClassification", BARE)),
    "xlm": (T, {"emb_dim": 64, "n_layers": 2, "n_heads": 4}, ("SequenceClassification", "TokenClassification", BARE)),
    "flaubert": (T, {"emb_dim": 64, "n_layers": 2, "n_heads": 4}, ("SequenceClassification", "TokenClassification", BARE)),
    "layoutlm": (boxed, {"max_2d_position_embeddings": 64}, HEADS),
    "layoutlmv3": (lambda n: boxed(n) | {"pixel_values": draw(n, 3, 28, 28)}, {"max_2d_position_embeddings": 64, "coordinate_size": 8, "shape_size": 16, "input_size": 28, "patch_size": 14}, ("SequenceClassification", "TokenClassification", "QuestionAnswering", BARE)),
    "lilt": (boxed, {"max_2d_position_embeddings": 64}, ("SequenceClassification", "TokenClassification", BARE)),
    "bros": (lambda n: text(n, bbox=draw(n, LENGTH, 4).abs()), {}, (BARE,)),
    "canine": (lambda n: {"input_ids": ids(n, 16, seed=n)}, {"num_hash_buckets": 64, "local_transformer_stride": 8, "downsampling_rate": 4, "upsampling_kernel_size": 4}, ("SequenceClassification", BARE)),
    "luke": (T, {"entity_vocab_size": 20, "entity_emb_size": 16}, ("MaskedLM", "SequenceClassification", BARE)),
    # decoders with other heads
    **{name: (T, {}, ("SequenceClassification", "TokenClassification", BARE)) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "mixtral", "phi3", "gpt2", "gpt_neox", "falcon", "bloom", "opt", "qwen2_moe", "stablelm", "phi", "starcoder2", "gpt_oss", "deepseek_v3", "gemma3_text", "qwen3_moe", "gpt_neo", "mpt", "gptj", "glm", "llama4_text", "cohere2", "exaone4", "smollm3", "helium", "olmo2")},
    "jamba": (T, {"attn_layer_period": 2, "attn_layer_offset": 1}, ("SequenceClassification",)),
    # encoder-decoders
    "t5": (T, T5, ("Seq2SeqLM", BARE, "SequenceClassification", "TokenClassification", "QuestionAnswering")),
    "mt5": (T, T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, ("Seq2SeqLM", BARE, "SequenceClassification", "TokenClassification")),
    "umt5": (T, T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, ("Seq2SeqLM", BARE, "SequenceClassification")),
    "longt5": (T, T5 | {"local_radius": 4, "encoder_attention_type": "local"}, ("Seq2SeqLM", BARE)),
    "switch_transformers": (T, T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "router_jitter_noise": 0.0, "expert_capacity": 64}, ("Seq2SeqLM", BARE)),
    "bart": (T, PLAIN, ("Seq2SeqLM", BARE, "SequenceClassification", "QuestionAnswering")),
    "mbart": (T, PLAIN, ("Seq2SeqLM", BARE, "SequenceClassification")),
    "pegasus": (T, PLAIN | {"decoder_start_token_id": 0}, ("Seq2SeqLM", BARE)),
    "pegasus_x": (T, PLAIN | {"decoder_start_token_id": 0, "block_size": 4, "num_global_tokens": 2}, ("Seq2SeqLM",)),
    "marian": (T, PLAIN | {"decoder_start_token_id": 0, "pad_token_id": 0}, ("Seq2SeqLM", BARE)),
    "m2m_100": (T, PLAIN, ("Seq2SeqLM", BARE)),
    "nllb-moe": (T, PLAIN | {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "router_jitter_noise": 0.0, "expert_capacity": 64, "moe_token_dropout": 0.0}, ("Seq2SeqLM", BARE)),
    "led": (T, PLAIN | {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}, ("Seq2SeqLM", BARE, "SequenceClassification")),
    "blenderbot": (T, PLAIN, ("Seq2SeqLM", BARE)),
    "blenderbot-small": (T, PLAIN, ("Seq2SeqLM",)),
    "plbart": (T, PLAIN, ("Seq2SeqLM",)),
    "mvp": (T, PLAIN, ("Seq2SeqLM",)),
    "prophetnet": (T, {"num_encoder_layers": 2, "num_decoder_layers": 2, "ngram": 2, "num_buckets": 8, "relative_max_distance": 16, "disable_ngram_loss": True, "decoder_start_token_id": 0}, ("Seq2SeqLM",)),
    "fsmt": (T, {"src_vocab_size": 127, "tgt_vocab_size": 127, "langs": ["en", "de"], "decoder_start_token_id": 2}, ("Seq2SeqLM",)),
    "bigbird_pegasus": (T, PLAIN | {"attention_type": "original_full", "decoder_start_token_id": 0}, ("Seq2SeqLM",)),
    "t5gemma": (T, {part: {"model_type": "t5_gemma_module", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 127, "sliding_window": 8, "attention_dropout": 0.0, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1} for part in ("encoder", "decoder")} | {"dropout_rate": 0.0, "attention_dropout": 0.0, "vocab_size": 127, "decoder_start_token_id": 1}, ("Seq2SeqLM",)),
    "whisper": (spectrum, PLAIN | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 40, "decoder_start_token_id": 1, "classifier_proj_size": 32, "suppress_tokens": None, "begin_suppress_tokens": None}, ("SpeechSeq2Seq", BARE, "AudioClassification")),
    "speech_to_text": (lambda n: {"input_features": draw(n, 32, 8, seed=n)}, PLAIN | {"input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 32, "max_source_positions": 40, "max_target_positions": 40, "decoder_start_token_id": 1}, ("SpeechSeq2Seq",)),
    "moonshine": (lambda n: {"input_values": draw(n, 2000, seed=n)}, {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4, "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4, "decoder_start_token_id": 1}, ("SpeechSeq2Seq",)),
    # sounds
    **{name: (sound, SPEECH, ("CTC", "AudioClassification", BARE)) for name in ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "wav2vec2-conformer", "sew")},
    "wav2vec2-bert": (lambda n: {"input_features": draw(n, 20, 8, seed=n)}, {k: v for k, v in SPEECH.items() if not k.startswith("conv_") and k != "num_feat_extract_layers"} | {"feature_projection_input_dim": 8, "position_embeddings_type": "relative_key", "left_max_position_embeddings": 8, "right_max_position_embeddings": 4, "conv_depthwise_kernel_size": 3}, ("CTC", BARE)),
    "audio-spectrogram-transformer": (lambda n: {"input_values": draw(n, 32, 16, seed=n)}, {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "num_labels": CLASSES}, ("AudioClassification", BARE)),
    # images
    **{name: (image, IMAGE, ("ImageClassification", BARE)) for name in ("vit", "deit", "dinov2", "dinov2_with_registers", "beit", "vit_msn", "ijepa", "data2vec-vision")},
    "dinov3_vit": (image, IMAGE, (BARE,)),
    "siglip_vision_model": (image, IMAGE, (BARE,)),
    "clip_vision_model": (image, IMAGE, (BARE,)),
    "vit_mae": (image, IMAGE | {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 32, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 48}, (BARE,)),
    "swin": (lambda n: image(n, 32), {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0, "num_labels": CLASSES}, ("ImageClassification", BARE)),
    "swinv2": (lambda n: image(n, 32), {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0, "num_labels": CLASSES}, ("ImageClassification", BARE)),
    "convnext": (lambda n: image(n, 32), {"image_size": 32, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": CLASSES}, ("ImageClassification", BARE)),
    "convnextv2": (lambda n: image(n, 32), {"image_size": 32, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": CLASSES}, ("ImageClassification",)),
    "segformer": (lambda n: image(n, 32), {"num_labels": CLASSES, "hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [2, 4], "num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 32, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}, ("ImageClassification", "SemanticSegmentation", BARE)),
    "yolos": (lambda n: image(n, 32), {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 5, "num_labels": CLASSES}, ("ObjectDetection",)),
    "dpt": (image, {"image_size": 28, "patch_size": 14, "backbone_out_indices": [0, 0, 1, 1], "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16, "is_hybrid": False, "num_labels": CLASSES}, ("DepthEstimation",)),
    "videomae": (lambda n: {"pixel_values": draw(n, 2, 3, 28, 28, seed=n)}, IMAGE | {"num_frames": 2, "tubelet_size": 2}, ("VideoClassification", BARE)),
    "timesformer": (lambda n: {"pixel_values": draw(n, 2, 3, 28, 28, seed=n)}, IMAGE | {"num_frames": 2, "drop_path_rate": 0.0}, ("VideoClassification",)),
    "sam": (lambda n: {"pixel_values": draw(n, 3, 32, 32, seed=n), "input_points": draw(n, 1, 2, 2).abs() * 10}, {"vision_config": {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48}, "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}, "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 4, "iou_head_hidden_dim": 16, "attention_downsample_rate": 1}}, ("MaskGeneration",)),
    # images and texts
    "clip": (captioned, DUAL, (BARE,)),
    "siglip": (captioned, DUAL, (BARE,)),
    "chinese_clip": (captioned, DUAL, (BARE,)),
    "altclip": (captioned, DUAL | {"text_config": TXT | {"project_dim": 32}}, (BARE,)),
    "blip": (captioned, DUAL, (BARE, "ImageTextToText")),
    "clipseg": (lambda n: captioned(n), DUAL | {"extract_layers": [0, 1], "reduce_dim": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}, (BARE,)),
    "siglip2": (lambda n: text(n) | {"pixel_values": draw(n, 4, 588, seed=n), "pixel_attention_mask": torch.ones(n, 4, dtype=torch.long), "spatial_shapes": torch.tensor([[2, 2]] * n)}, DUAL | {"vision_config": {**TOW, "num_patches": 4}}, (BARE,)),
    "clap": (lambda n: text(n) | {"input_features": draw(n, 1, 64, 16, seed=n)}, {"text_config": TXT, "audio_config": {"spec_size": 32, "hidden_size": 32, "patch_size": 4, "patch_stride": [4, 4], "num_mel_bins": 16, "depths": [1, 1], "num_attention_heads": [2, 2], "window_size": 4, "patch_embeds_hidden_size": 16, "num_classes": 5, "drop_path_rate": 0.0, "num_hidden_layers": 2}, "projection_dim": 32}, (BARE,)),
    "vilt": (lambda n: captioned(n), IMAGE | {"max_image_length": -1}, (BARE, "QuestionAnsweringX")),
    "owlvit": (lambda n: {"input_ids": ids(n, 9), "attention_mask": torch.ones(n, 9, dtype=torch.long)} | image(n), DUAL, (BARE,)),
}


def names() -> tuple[str, ...]:
    """All of them: the type and the task."""
    return tuple(f"{kind} {task}" for kind, (_, _, tasks) in TABLE.items() for task in tasks if not task.endswith("X") and CONFIG_MAPPING[kind] in getattr(transformers, class_name(f"{kind} {task}"))._model_mapping)


def config(name: str) -> PreTrainedConfig:
    """The tiny config."""
    kind, _, task = name.partition(" ")
    labels = {"num_labels": CLASSES} if task.endswith("Classification") or task in ("SemanticSegmentation", "ObjectDetection") else {}
    known = tiny.known(kind) | {"num_labels"}
    return tiny.config(kind, **{k: v for k, v in {**NO_DROP, **TABLE[kind][1], **labels}.items() if k in known or k not in NO_DROP})


NO_DROP: dict[str, object] = {"dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0}


def class_name(name: str) -> str:
    task = name.partition(" ")[2]
    return "AutoModel" if task == BARE else f"AutoModelFor{task}"


def build(name: str) -> PreTrainedModel:
    """The tiny model in float32, the same in every process."""
    auto = getattr(transformers, class_name(name))
    return tiny.randomised(lambda: auto.from_config(config(name), dtype=torch.float32))


@cache
def subject(name: str) -> Subject:
    """How it is loaded and called."""
    kind, _, task = name.partition(" ")
    make = TABLE[kind][0]
    feeds = []
    for rows in (2, 3):
        feed = make(rows)
        if task == "MultipleChoice":
            feed = {key: torch.stack([value, value.roll(3, 0).flip(1)], 1) for key, value in feed.items()}
        feeds.append(feed | labels_of(task, feed, rows))
    if task == BARE and kind in ENCODER_DECODERS:
        feeds = [feed | {"decoder_input_ids": ids(len(next(iter(feed.values()))), 5)} for feed in feeds]
    if kind in ("clip", "siglip", "blip", "altclip", "chinese_clip", "clipseg", "siglip2", "clap"):
        pass
    return Subject(class_name(name), tuple(feeds), generates=task in ("Seq2SeqLM", "SpeechSeq2Seq", "ImageTextToText"), all_outputs=True)


ENCODER_DECODERS = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "bart", "mbart", "pegasus", "marian", "m2m_100", "nllb-moe", "led", "blenderbot", "whisper")
