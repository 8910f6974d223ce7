"""`shardwise generate`: the text of one process, and what is said where there can be none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llamas import llama
from shardwise.errors import MeshError, PlanError, ShardwiseError
from shardwise.launch import WorkerError
from shardwise.prompt.request import Request
from shardwise.prompt.run import start

WORDS = [f"w{number}" for number in range(64)]
PROMPT = "w5 w9 w33 w2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer, which has a chat template."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    llama(initializer_range=0.3).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*WORDS, "<unk>"])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "w60 {{ messages[0]['content'] }} w61"
    tokenizer.save_pretrained(path)
    return path


def said(*arguments: object) -> str:
    """What the program writes."""
    command = [sys.executable, "-m", "shardwise.cli", "generate", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def expected(folder: Path, ids: list[int]) -> list[int]:
    """Ten tokens of one process."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=10, do_sample=False)
    return tokens[0, len(ids) :].tolist()


def test_the_text_of_one_process(folder: Path) -> None:
    """Guards: other tokens, text written by every rank, the prompt repeated, or a chat template that nobody applies."""
    ids = [5, 9, 33, 2]
    for chat, given in ((), ids), (("--chat",), [60, *ids, 61]):
        text = said(folder, "--tp", 2, "--prompt", PROMPT, "--new-tokens", 10, *chat)
        assert text == " ".join(WORDS[token] for token in expected(folder, given))


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (Request("MODEL", 2), ShardwiseError, "What to continue"),
        (Request("MODEL", 2, prompt="w1", ids=(1,)), ShardwiseError, "What to continue"),
        (Request("MODEL", 2, ids=(1, 64)), ShardwiseError, "64 is not among the 64 tokens"),
        (Request("MODEL", 2, ids=(1, -3)), ShardwiseError, "-3 is not among the 64 tokens"),
        (Request("vit", 2, ids=(1,), random=True), ShardwiseError, "continues no text"),
        (Request("llama", 2, ids=(1,) * 64, random=True), ShardwiseError, "64 tokens, and llama positions for 64"),
        (Request("MODEL", 3, ids=(1,)), PlanError, "tp=3"),
        (Request("MODEL", 2, ids=(1,), dtype="float33"), ShardwiseError, "float33"),
        (Request("llama", 2, prompt="w1", random=True), ShardwiseError, "no tokenizer"),
        (Request("llama", 2, prompt="w1"), ShardwiseError, "--random"),
    ],
)
def test_what_cannot_be(request_: Request, error: type, words: str, folder: Path) -> None:
    """Guards: ranks that are started to fail, and a traceback of theirs in place of a sentence."""
    fields = vars(request_) | {"model": str(folder) if request_.model == "MODEL" else request_.model}
    with pytest.raises(error, match=words):
        start(Request(**fields))


def test_another_number_of_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a model that is cut for two, on the four ranks that torchrun has started."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(MeshError, match="4 processes have been started"):
        start(Request(str(folder), 2, ids=(1,)))


def test_as_many_tokens_as_there_are_positions() -> None:
    """Guards: an `IndexError` at the end of the table of positions, where more tokens are asked for "at most" than it has."""
    assert len(said("gpt2", "--random", "--ids", "1 2", "--new-tokens", 100, "--tp", 2).split()) <= 62


def test_a_checkpoint_that_ranks_cannot_read(folder: Path, tmp_path: Path) -> None:
    """Guards: forty lines of traceback, or the word of a rank that another one has failed, in place of what is wrong."""
    broken = tmp_path / "model"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"<html>")
    with pytest.raises(WorkerError, match=r"this is not a safetensors file|the file is truncated") as error:
        start(Request(str(broken), 2, ids=(1,)))
    assert "Traceback" not in str(error.value)
