"""What is measured of one type: in this process on the plain model, on every rank on its shards; and what is compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from figures import gradient_error, gradients, held_in_common
from parity.calls import Around, text_only
from parity.drafts import assisted, drafted
from shardwise.infer.products import tensors
from shardwise.loading import from_pretrained
from shardwise.plan import Plan

LOGITS = 1e-4  # float32 sums of some 100 terms of order 1 differ by 1e-6; a lost or doubled term is of order 1e-2 at least
LOSS = 1e-5
GRADIENTS = 1e-3  # relative; what is not summed, or summed twice, is wrong by half of itself or by itself


@dataclass(frozen=True)
class Subject:
    """How a type is loaded and called.

    Args:
        auto: the Auto class that loads it, by name.
        feeds: the two micro-batches.
        arguments: what every call has besides.
        generates: whether it goes on with a text.
        all_outputs: all that it returns is compared, not the logits alone.
        beams: in how many beams it generates.
        around: what has to be on while it is made and runs.
        target: the type of the model for which it drafts, and whose states it is called with.
    """

    auto: str = "AutoModelForCausalLM"
    feeds: tuple[Mapping[str, Any], ...] = field(default_factory=text_only)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    generates: bool = True
    all_outputs: bool = False
    beams: tuple[int, ...] = (1,)
    around: Around = nullcontext
    target: str = ""


@dataclass(frozen=True)
class Measured:
    """What one process or rank finds, of two micro-batches. The gradients, after each of them, are on the first rank alone.

    `plan`: of the shards; None of the plain model.
    """

    logits: list[Tensor]
    losses: list[Tensor]
    gradients: list[dict[str, Tensor] | None]
    common: list[dict[str, Tensor]]
    tokens: Tensor
    plan: Plan | None = None


@dataclass(frozen=True)
class Outcome:
    """A type on some ranks beside one process: the largest errors, and in words everything that is not as it should be."""

    logits: float
    gradients: float
    plan: Plan
    wrong: tuple[str, ...]

    @property
    def share(self) -> float:
        """The bytes of the fullest rank, times the ranks, over those of the model."""
        plan = self.plan
        return max(map(plan.local_bytes, range(plan.size))) * plan.size / plan.full_bytes


def measure_plain(path: Path, subject: Subject) -> Measured:
    """Of the ordinary model, in this process."""
    with quiet(), subject.around():
        model = _kind(path, subject).from_pretrained(path, dtype=torch.float32)
        target = AutoModelForCausalLM.from_pretrained(target_of(path)) if subject.target else None
        return _measure(model, subject, target)


def measure_sharded(path: Path, saved: Path, subject: Subject, plan: str | Plan = "auto") -> Measured:
    """On every rank, of its shards, which are saved to `saved`."""
    with quiet(), subject.around():
        model = from_pretrained(_kind(path, subject), path, dtype=torch.float32, tp_plan=plan)
        model.save_pretrained(saved)
        target = from_pretrained(AutoModelForCausalLM, target_of(path), tp_plan="auto") if subject.target else None
        return _measure(model, subject, target)


def target_of(path: Path) -> Path:
    """Where the model is for which the one at `path` drafts."""
    return path.with_name(f"{path.name}, its target")


def compare(ranks: Sequence[Measured], plain: Measured, loaded: Path, saved: Path) -> Outcome:
    """What the ranks found beside what one process found."""
    logits = max(_distance(rank.logits, plain.logits) for rank in ranks)
    loss = max(_distance(rank.losses, plain.losses) for rank in ranks)
    wrong = [f"logits are off by {logits:.1e}"] if not logits < LOGITS else []
    wrong += [f"the loss is off by {loss:.1e}"] if not loss < LOSS else []
    gradient, said = _compare_gradients(ranks[0].gradients, plain.gradients)
    wrong += said + _differing(ranks)
    if not all(torch.equal(rank.tokens, plain.tokens) for rank in ranks):
        wrong.append("other tokens are generated")
    files = sorted({path.name for at in (loaded, saved) for path in at.iterdir()})
    changed = [name for name in files if _bytes(loaded / name) != _bytes(saved / name)]
    wrong += [f"saved {', '.join(changed)} other than loaded"] if changed else []
    assert ranks[0].plan is not None
    return Outcome(logits, gradient, ranks[0].plan, tuple(wrong))


def _kind(path: Path, subject: Subject) -> type:
    """The Auto class; of a checkpoint whose type it does not know (a part of another one), the class that saved it."""
    config, auto = AutoConfig.from_pretrained(path), getattr(transformers, subject.auto)
    return auto if type(config) in auto._model_mapping else getattr(transformers, config.architectures[0])


def _measure(model: PreTrainedModel, subject: Subject, target: PreTrainedModel | None) -> Measured:
    logits, losses, accumulated, common = [], [], [], []
    model.train()
    for feed in drafted(target) if target is not None else subject.feeds:
        torch.manual_seed(0)  # for a router that draws
        output = model(**feed, **subject.arguments)
        found = _numbers(output) if subject.all_outputs else output.logits
        loss = output["loss"] if output.get("loss") is not None else _weighed(found)
        loss.backward()
        logits.append(found.detach())
        losses.append(loss.detach())
        accumulated.append(gradients(model))
        common.append({name: gradient.clone() for name, gradient in held_in_common(model).items() if gradient is not None})
    model.zero_grad()
    model.eval()
    if target is not None:
        tokens = assisted(model, target)
    else:
        tokens = _generated(model, subject) if subject.generates else torch.empty(0)
    return Measured(
        logits, losses, accumulated, common, tokens, model._shardwise.plan if hasattr(model, "_shardwise") else None
    )


def _numbers(output: Any) -> Tensor:
    """All floating numbers that a model returned, one after the other; caches, which differ from rank to rank, are no part."""
    return torch.cat([value.flatten() for value in tensors(output) if value.is_floating_point()])


def _weighed(numbers: Tensor) -> Tensor:
    """A loss for a model that has none."""
    return (numbers * torch.randn(numbers.shape, generator=torch.Generator().manual_seed(5))).mean()


def _generated(model: PreTrainedModel, subject: Subject) -> Tensor:
    options = {**subject.arguments, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = []
    for beams in subject.beams:
        # BLIP writes to its ids.
        prompt = {name: given.clone() for name, given in subject.feeds[0].items() if name != "labels"}
        found.append(model.generate(**prompt, **options, num_beams=beams))
    return torch.cat(found)


def _compare_gradients(
    actual: Sequence[dict[str, Tensor] | None], expected: Sequence[dict[str, Tensor] | None]
) -> tuple[float, list[str]]:
    worst, wrong = 0.0, []
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True), start=1):
        assert ours is not None
        assert theirs is not None
        if odd := sorted(ours.keys() ^ theirs.keys()):
            return float("inf"), [f"gradients missing or extra: {', '.join(odd[:3])}"]
        error = gradient_error(ours, theirs)
        worst = max(worst, error)
        wrong += [f"gradients of {number} micro-batches are off by {error:.1e}"] if not error < GRADIENTS else []
    return worst, wrong


def _differing(ranks: Sequence[Measured]) -> list[str]:
    seen: dict[tuple[int, str], Tensor] = {}
    differ = [
        name
        for rank in ranks
        for number, common in enumerate(rank.common)
        for name, gradient in common.items()
        if not torch.equal(seen.setdefault((number, name), gradient), gradient)
    ]
    return [f"replicated gradients differ between ranks: {', '.join(sorted(set(differ))[:3])}"] if differ else []


def _distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
        return float("inf")
    return max((a - e).abs().max().item() for a, e in zip(actual, expected, strict=True))


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings of odd sizes, which all tiny models have."""
    earlier = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(earlier)
        logging.enable_progress_bar()
