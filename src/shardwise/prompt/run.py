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
from shardwise.launch import check_size, launched, run_as_ranks
from shardwise.prompt.request import Request
from shardwise.subject import Subject, dtype_named, find

_SECONDS = 24 * 3600.0


def start(request: Request) -> None:
    """Generate: as one of torchrun's ranks, or on ranks of its own.

    Raises `ShardwiseError` for what cannot be, before a rank is started where that can be known; `WorkerError` for a rank that
    failed.
    """
    subject = find(request.model, random=request.random, layers=request.layers)
    _dtype(request)
    read_ids(request, subject)
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
        model: Any = shardwise.AutoModelForCausalLM.from_pretrained(
            subject.make(Path(folder)), dtype=_dtype(request), tp_plan=request.plan, tp_size=request.tp
        )
    torch.manual_seed(request.seed)
    first = int(os.environ["RANK"]) == 0
    writes = first and tokenizer is not None
    sampling = {"temperature": request.temperature} if request.temperature else {}
    tokens = model.eval().generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        max_new_tokens=request.new_tokens,
        do_sample=bool(sampling),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if writes else None,
        **sampling,
    )
    if first and not writes:
        typer.echo(" ".join(map(str, tokens[0, ids.shape[1] :].tolist())))


def read_ids(request: Request, subject: Subject) -> tuple[torch.Tensor, PreTrainedTokenizerBase | None]:
    """The prompt as tokens, (1, length) int64, and what turns tokens into text; None where ids were given."""
    if bool(request.ids) == (request.prompt is not None):
        raise ShardwiseError(describe("What to continue?", either=["--prompt TEXT, or", "--ids '1 2 3', of any model"]))
    vocabulary = subject.config.get_text_config().vocab_size
    if request.ids:
        if not all(0 <= token < vocabulary for token in request.ids):
            raise ShardwiseError(f"--ids: {max(request.ids)} is not among the {vocabulary} tokens of {request.model}.")
        return torch.tensor([request.ids]), None
    tokenizer = _tokenizer(request.model)
    if request.chat:
        said = [{"role": "user", "content": request.prompt}]
        found = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        found = tokenizer(request.prompt, return_tensors="pt")
    return found["input_ids"], tokenizer


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
