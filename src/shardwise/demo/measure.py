"""The demo's course on each rank: load, train, generate, save, open again. What is found out comes back on rank 0."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import shardwise
from shardwise.demo import compare
from shardwise.demo.checks import Curve, Generated, Loaded, Measured, Saved, Trained
from shardwise.demo.settings import Settings, model_config
from shardwise.demo.text import Text
from shardwise.demo.train import Run, Training, train
from shardwise.launch import run_as_ranks
from shardwise.model_state import required_state

_RELOAD_SECONDS = 300.0
_EVALUATED = 8

NO_REPEAT = 8
"""Bytes that are not generated twice in a row of this length: a model this young would say one word for ever."""


@dataclass(frozen=True)
class Watcher:
    """Who is told how far the demo is: `stage` with a few words when something new begins, `step` after each training step."""

    stage: Callable[[str], None]
    step: Callable[[Training], None]


@dataclass(frozen=True)
class Models:
    """The model in shards and, on rank 0, whole; both from one checkpoint, of which rank 0 also keeps the tensors."""

    sharded: Any
    whole: Any
    start: dict[str, Tensor] | None


def measure(settings: Settings, text: Text, watcher: Watcher) -> Measured | None:
    """Run the whole course, and return what was found on rank 0, None on the others. Collective.

    Needs a default process group. Writes into `settings.work` and `settings.checkpoint`.
    """
    watcher.stage("making a model and loading it, whole and in shards")
    models = _load(settings)
    loaded = _loaded(models)
    trained = _train(models, settings, text, watcher)
    watcher.stage("generating")
    generated = _generate(models, settings, text)
    saved = _save(models, settings, text, generated, watcher)
    if loaded is None or trained is None or saved is None:
        return None
    return Measured(loaded, trained, generated, saved)


def reload(settings: Settings) -> None:
    """Open the saved checkpoint on the ranks that this is one of; leave its logits and what they save again. Collective."""
    model = shardwise.AutoModelForCausalLM.from_pretrained(settings.checkpoint, dtype=torch.float32, tp_plan="auto")
    logits = _logits(model, load_file(_tokens_file(settings))["tokens"])
    if dist.get_rank() == 0:
        save_file({"logits": logits}, _logits_file(settings))
    model.save_pretrained(_saved_again(settings))


def _load(settings: Settings) -> Models:
    whole = None
    if dist.get_rank() == 0:
        torch.manual_seed(settings.seed)
        transformers.AutoModelForCausalLM.from_config(model_config(settings.size)).save_pretrained(settings.work)
        whole = _plain(settings.work)
    dist.barrier()  # the others wait for the checkpoint
    sharded = shardwise.AutoModelForCausalLM.from_pretrained(settings.work, dtype=torch.float32, tp_plan="auto")
    return Models(sharded, whole, shardwise.full_state_dict(sharded))


def _loaded(models: Models) -> Loaded | None:
    plan, rank_bytes = required_state(models.sharded).plan, _on_all_ranks(_bytes(models.sharded))
    if models.whole is None or models.start is None:
        return None
    planned = [sum(row.local_bytes(rank, plan.size) for row in plan if not row.buffer) for rank in range(plan.size)]
    unlike = compare.differing_tensors(models.start, models.whole.state_dict())
    return Loaded(unlike, _bytes(models.whole), rank_bytes, planned)


def _train(models: Models, settings: Settings, text: Text, watcher: Watcher) -> Trained | None:
    training = train(models.sharded, models.whole, text, settings, watcher.step)
    watcher.stage("comparing the trained models")
    end, replicas = shardwise.full_state_dict(models.sharded), compare.differing_replicas(models.sharded)
    held_out = text.held_out_batch(_EVALUATED, settings.size.length)
    sharded = _curve(training.sharded, held_out)
    if training.whole is None or models.start is None or end is None:
        return None
    given, expected = training.sharded.first_gradients, training.whole.first_gradients
    return Trained(
        whole=_curve(training.whole, held_out),
        sharded=sharded,
        gradients=compare.gradient_difference(given or {}, expected or {}),
        drift=compare.drift(end, models.whole.state_dict(), models.start),
        replicas=replicas,
        tokens=settings.size.batch * settings.size.length,
    )


def _generate(models: Models, settings: Settings, text: Text) -> Generated:
    tokens = _continue(models.sharded, text.prompt, settings.size.new_tokens)
    everyones = _on_all_ranks(tokens)
    return Generated(text.prompt, everyones[0], max(compare.differing_tokens(other, everyones[0]) for other in everyones))


def _save(models: Models, settings: Settings, text: Text, generated: Generated, watcher: Watcher) -> Saved | None:
    watcher.stage("saving")
    dist.barrier()  # rank 0 has worked alone
    models.sharded.save_pretrained(settings.checkpoint)
    end = shardwise.full_state_dict(models.sharded)
    tokens = text.held_out_batch(_EVALUATED, settings.size.length)
    logits = _logits(models.sharded, tokens)
    found = _open_again(settings, tokens, logits, end, generated, watcher) if end is not None else None
    dist.barrier()  # the others wait for rank 0: if they left, its end of the process group would break
    return found


def _open_again(
    settings: Settings, tokens: Tensor, logits: Tensor, end: dict[str, Tensor], generated: Generated, watcher: Watcher
) -> Saved:
    watcher.stage("opening the checkpoint in plain transformers")
    plain = _plain(settings.checkpoint)
    continued = _continue(plain, generated.prompt, settings.size.new_tokens)
    watcher.stage(f"opening the checkpoint on {settings.reload_tp} ranks")
    save_file({"tokens": tokens}, _tokens_file(settings))
    command = [sys.executable, "-m", "shardwise.demo", "reload", settings.to_json()]
    run_as_ranks(command, settings.reload_tp, timeout=_RELOAD_SECONDS, show=False)
    return Saved(
        unlike=compare.differing_tensors(load_file(settings.checkpoint / "model.safetensors"), end),
        plain_logits=compare.largest_difference(_logits(plain, tokens), logits),
        plain_tokens=compare.differing_tokens(continued, generated.tokens),
        tp=settings.reload_tp,
        logits=compare.largest_difference(load_file(_logits_file(settings))["logits"], logits),
        files=compare.differing_files(_saved_again(settings), settings.checkpoint),
    )


def _plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _curve(run: Run, held_out: Tensor) -> Curve:
    return Curve(run.losses, run.norms, run.seconds, run.evaluate(held_out))


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _continue(model: Any, prompt: str, count: int) -> list[int]:
    tokens = torch.tensor([list(prompt.encode())])
    options = {"max_new_tokens": count, "do_sample": False, "no_repeat_ngram_size": NO_REPEAT}
    both = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return list(map(int, both[0, tokens.shape[1] :]))


def _on_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _tokens_file(settings: Settings) -> Path:
    return settings.work / "tokens.safetensors"


def _logits_file(settings: Settings) -> Path:
    return settings.work / "logits.safetensors"


def _saved_again(settings: Settings) -> Path:
    return settings.work / "saved-again"
