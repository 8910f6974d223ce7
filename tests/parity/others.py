"""What `tp_plan="auto"` is asked for besides causal LMs and wrappers: encoders, encoder-decoders and towers, with any head.

Each is a type and a task: "bert MaskedLM" is what `AutoModelForMaskedLM` makes of a BertConfig, "bert" what `AutoModel` does.
All are tiny, and have two micro-batches of two and three rows; of three texts the first is padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from parity.job import Subject
from parity.seen import CLASSES, SIDE, Other, ids
from parity.senses import SENSES
from parity.texts import LENGTH, TEXTS
from shardwise import tiny

OTHERS: Mapping[str, Other] = {**TEXTS, **SENSES}

Labels = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]


def _classes(feed: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    return {"labels": ids(rows, below=CLASSES)}


def _texts(feed: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    return {"labels": feed["input_ids"] if "input_ids" in feed else ids(rows, LENGTH)}


def _span(feed: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    return {"start_positions": ids(rows, below=4), "end_positions": 2 + ids(rows, below=4)}


LABELS: dict[str, Labels] = {
    "AudioClassification": _classes,
    "CTC": lambda feed, rows: {"labels": 1 + ids(rows, 4, below=29)},
    "ImageClassification": _classes,
    "ImageTextToText": _texts,
    "MaskedLM": _texts,
    "MultipleChoice": lambda feed, rows: {"labels": ids(rows, below=2)},
    "NextSentencePrediction": lambda feed, rows: {"labels": ids(rows, below=2)},
    "QuestionAnswering": _span,
    "SemanticSegmentation": lambda feed, rows: {"labels": ids(rows, SIDE, SIDE, below=CLASSES)},
    "Seq2SeqLM": _texts,
    "SequenceClassification": _classes,
    "SpeechSeq2Seq": _texts,
    "TokenClassification": lambda feed, rows: {"labels": ids(rows, LENGTH, below=CLASSES)},
    "VideoClassification": _classes,
}
"""Of the tasks that have a loss."""
GENERATES = ("ImageTextToText", "Seq2SeqLM", "SpeechSeq2Seq")
FAST = (
    *("bert MaskedLM", "bert MultipleChoice", "modernbert SequenceClassification", "deberta-v2 TokenClassification"),
    *("distilbert QuestionAnswering", "albert", "nomic_bert", "llama SequenceClassification", "gpt2 TokenClassification"),
    *("mixtral SequenceClassification", "qwen3", "t5 Seq2SeqLM", "mt5", "bart Seq2SeqLM", "m2m_100 Seq2SeqLM"),
    *("nllb-moe Seq2SeqLM", "whisper SpeechSeq2Seq", "wav2vec2 CTC", "vit ImageClassification", "dinov2"),
    *("swin ImageClassification", "clip", "siglip2", "audio-spectrogram-transformer AudioClassification"),
)
"""The ones that are tested each time; `make parity ARGS=others` runs all."""
# Loading makes zeros of the row of their padding, so that a checkpoint that is saved again has them.
ZEROED = ("chinese_clip", "funnel")


def names() -> tuple[str, ...]:
    """All of them."""
    return tuple(f"{kind} {task}".strip() for kind, other in OTHERS.items() for task in other.tasks)


def config(name: str) -> PreTrainedConfig:
    """The tiny config."""
    kind, _, task = name.partition(" ")
    classified = task.endswith("Classification") or task == "SemanticSegmentation"
    return tiny.config(kind, **OTHERS[kind].options, **({"num_labels": CLASSES} if classified else {}))


def auto_class(name: str) -> str:
    """The Auto class that makes it."""
    task = name.partition(" ")[2]
    return f"AutoModelFor{task}" if task else "AutoModel"


def build(name: str) -> PreTrainedModel:
    """The tiny model in float32, the same in every process."""
    auto = getattr(transformers, auto_class(name))
    model = tiny.randomised(lambda: auto.from_config(config(name), dtype=torch.float32))
    if name.partition(" ")[0] in ZEROED:
        padded = (part for part in model.modules() if isinstance(part, nn.Embedding) and part.padding_idx is not None)
        with torch.no_grad():
            for embedding in padded:
                embedding.weight[embedding.padding_idx] = 0
    return model


@cache
def subject(name: str) -> Subject:
    """How it is loaded and called."""
    kind, _, task = name.partition(" ")
    return Subject(
        auto_class(name),
        tuple(_feed(OTHERS[kind], task, rows) for rows in (2, 3)),
        generates=task in GENERATES,
        all_outputs=True,
        beams=(1, 2),
    )


def _feed(other: Other, task: str, rows: int) -> dict[str, Tensor]:
    feed = dict(other.feed(rows))
    if task == "MultipleChoice":
        feed = {key: torch.stack([value, value.roll(3, 0).flip(1)], 1) for key, value in feed.items()}
    if not task and other.decodes:
        feed["decoder_input_ids"] = ids(rows, 5)
    return feed | LABELS.get(task, lambda feed, rows: {})(feed, rows)
