"""From a request to the text, which the first rank writes as it comes."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

import shardwise
from shardwise.errors import ShardwiseError, describe
from shardwise.hf import class_of
from shardwise.launch import check_size, launched, run_as_ranks
from shardwise.prompt.request import Request
from shardwise.subject import Subject, dtype_named, find, positions

_SECONDS = 24 * 3600.0


def start(request: Request) -> None:
    """Generate: as one of torchrun's ranks, or on ranks of its own.

    Raises `ShardwiseError` for what cannot be, before a rank is started where that can be known; `WorkerError` for a rank that
    failed.
    """
    subject = find(request.model, random=request.random, layers=request.layers)
    _auto_class(request, subject)
    _dtype(request)
    ids, _ = read_ids(request, subject)
    _room(request, subject, ids)
    shardwise.plan(subject.config, request.tp, request.plan)
    if not launched():
        command = [sys.executable, "-m", "shardwise.prompt", request.to_json()]
        run_as_ranks(command, request.tp, timeout=_SECONDS)
        return
    check_size(request.tp)
    run(request)


def run(request: Request) -> None:
    """One rank of it. Collective."""
    subject = find(request.model, random=request.random, layers=request.layers)
    ids, tokenizer = read_ids(request, subject)
    with tempfile.TemporaryDirectory(prefix="shardwise-") as folder:
        model: Any = _auto_class(request, subject).from_pretrained(
            subject.make(Path(folder)), dtype=_dtype(request), tp_plan=request.plan, tp_size=request.tp
        )
    torch.manual_seed(request.seed)
    first = int(os.environ["RANK"]) == 0
    writes = first and tokenizer is not None
    sampling: dict[str, Any] = {"temperature": request.temperature} if request.temperature else {}
    if subject.path is None and subject.config.is_encoder_decoder:
        sampling["decoder_start_token_id"] = 0  # which the config of a type leaves open
    tokens = model.eval().generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        max_new_tokens=_room(request, subject, ids),
        do_sample=request.temperature > 0,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if writes else None,
        **sampling,
    )
    if first and not writes:
        typer.echo(" ".join(map(str, tokens[0, _given(subject, ids) :].tolist())))


def read_ids(request: Request, subject: Subject) -> tuple[torch.Tensor, PreTrainedTokenizerBase | None]:
    """The prompt as tokens, (1, length) int64, and what turns tokens into text; None where ids were given."""
    if bool(request.ids) == (request.prompt is not None):
        raise ShardwiseError(describe("What to continue?", either=["--prompt TEXT, or", "--ids '1 2 3', of any model"]))
    vocabulary = subject.config.get_text_config().vocab_size
    if request.ids:
        if (wrong := next((token for token in request.ids if not 0 <= token < vocabulary), None)) is not None:
            raise ShardwiseError(f"--ids: {wrong} is not among the {vocabulary} tokens of {request.model}, which count from 0.")
        return torch.tensor([request.ids]), None
    tokenizer = _tokenizer(request.model)
    if request.chat:
        said = [{"role": "user", "content": request.prompt}]
        found = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        found = tokenizer(request.prompt, return_tensors="pt")
    return found["input_ids"], tokenizer


def _auto_class(request: Request, subject: Subject) -> Any:
    """By which class the model is loaded. Raises `ShardwiseError` for one that continues no text."""
    auto: Any = class_of(subject.config)
    made = auto._model_mapping[type(subject.config)] if hasattr(auto, "_model_mapping") else auto
    twin = getattr(shardwise, auto.__name__, None)
    if twin is None or not made.can_generate() or made.main_input_name != "input_ids":
        raise ShardwiseError(
            describe(
                f"{request.model} ({made.__name__}) continues no text.",
                either=["a causal language model, or one with an encoder and a decoder"],
            )
        )
    return twin


def _given(subject: Subject, ids: torch.Tensor) -> int:
    """How many tokens the decoder has before it generates any: of a model with an encoder, which reads the prompt, one."""
    return 1 if subject.config.is_encoder_decoder else ids.shape[1]


def _room(request: Request, subject: Subject, ids: torch.Tensor) -> int:
    """How many tokens are generated at most. Raises `ShardwiseError` for a prompt after which there is no position left."""
    given = _given(subject, ids)
    room = positions(subject.config, most=given + request.new_tokens) - given
    if room < 1:
        raise ShardwiseError(
            f"The prompt has {given} tokens, and {request.model} positions for {room + given}: a shorter one is needed."
        )
    return room


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ShardwiseError(
            describe(
                f"{model} has no tokenizer that transformers can read.",
                why=str(error).splitlines()[0],
                either=["put its files beside config.json, or", "--ids '1 2 3' in place of --prompt"],
            )
        ) from error


def _dtype(request: Request) -> torch.dtype | Literal["auto"]:
    return dtype_named(request.dtype) if request.dtype is not None else "auto"
