"""`shardwise.Trainer`: the loss curve, norms, metrics and checkpoints of one process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, TrainingArguments

import shardwise
from models import checkpoint
from on_ranks import load
from shardwise.errors import MismatchError, ShardwiseError

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # PEFT asks by the old name
    "ignore:.*pin_memory.*",
    "ignore:Could not find a config file",
)


class Texts(Dataset):
    """Random token sequences, of which parts of some are not counted in the loss."""

    def __init__(self, count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 127, (count, 10), generator=draw)
        self.labels = self.ids.clone()
        self.labels[::3, 6:] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


ODD = 7  # samples, no multiple of any batch size


@dataclass
class Run:
    """What a run logged (the steps and the end), and what it found in evaluation and prediction."""

    logs: list[dict[str, float]]
    metrics: dict[str, float]
    predictions: Any
    replicas_agree: bool = True


def arguments(folder: Path, batch: int, **changes: Any) -> TrainingArguments:
    """Two epochs of clipped steps on the CPU, logged each."""
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": batch,
            "num_train_epochs": 2,
            "learning_rate": 3e-3,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "logging_steps": 1,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 11,
            **changes,
        }
    )


def accuracy(found: Any) -> dict[str, float]:
    """How many labels the prediction hits, and how many there are."""
    logits, labels = torch.as_tensor(found.predictions)[:, :-1], torch.as_tensor(found.label_ids)[:, 1:]
    return {"hits": float((logits.argmax(-1) == labels).sum()), "rows": float(len(labels))}


def run(
    kind: type,
    model: Any,
    folder: Path,
    batch: int,
    samples: int = 3 * ODD,
    evaluated: int = ODD,
    resume: str | None = None,
    **changes: Any,
) -> Run:
    """Train, evaluate and predict."""
    trainer = kind(
        model=model,
        args=arguments(folder, batch, **changes),
        train_dataset=Texts(samples, 0),
        eval_dataset=Texts(evaluated, 1),
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    predicted = trainer.predict(Texts(ODD, 1)).predictions
    trainer.save_model(folder / "final")
    return Run(trainer.state.log_history, metrics, torch.as_tensor(predicted))


def lora(model: Any) -> Any:
    """With a fresh adapter, the same for the same seed."""
    torch.manual_seed(17)
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]))


def run_sharded(path: Path, folder: Path, batch: int, tp: int, adapters: bool = False, **changes: Any) -> Run:
    """On a rank."""
    inner = load(path, tp_size=tp)
    found = run(shardwise.Trainer, lora(inner) if adapters else inner, folder, batch, **changes)
    found.replicas_agree = _agree(inner)
    return found


def _agree(model: Any) -> bool:
    """Whether what several ranks hold is the same on all of them, bit for bit."""
    state = model._shardwise
    whole = [p.detach().flatten() for name, p in model.named_parameters() if not state.row(name).sharded]
    mine = torch.cat(whole)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return all(torch.equal(mine, other) for other in everyone)


def run_plain(path: Path, folder: Path, batch: int, adapters: bool = False, **changes: Any) -> Run:
    """In this process."""
    model = plain(path)
    return run(transformers.Trainer, lora(model) if adapters else model, folder, batch, **changes)


def plain(path: Path) -> Any:
    """The ordinary model."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


TIMES = ("runtime", "per_second")


def compare(found: Run, expected: Run) -> None:
    """After up to twelve steps of AdamW; a wrong scale, norm or batch shows in the first one or two digits."""
    assert len(found.logs) == len(expected.logs)
    for mine, wanted in zip(found.logs, expected.logs, strict=True):
        assert mine.keys() == wanted.keys()
        for key in wanted:
            if not key.endswith(TIMES):
                assert mine[key] == pytest.approx(wanted[key], rel=2e-4), key
    for key, value in expected.metrics.items():
        if not key.endswith(TIMES):
            assert found.metrics[key] == pytest.approx(value, rel=2e-4), key
    assert found.predictions.shape == expected.predictions.shape
    torch.testing.assert_close(found.predictions, expected.predictions, atol=2e-3, rtol=1e-3)
    assert found.replicas_agree


def same_files(found: Path, expected: Path) -> None:
    """Checkpoints with the same tensors, within the noise of the steps."""
    mine, wanted = ({file.name for file in folder.iterdir() if "rng" not in file.name} for folder in (found, expected))
    assert mine == wanted  # there is a random state of each process
    for file in expected.glob("*.safetensors"):
        mine, wanted = load_file(found / file.name), load_file(file)
        assert mine.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(mine[key], wanted[key], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_two_ranks_train_as_one_process(pool2, tmp_path_factory, tmp_path, adapters):
    """Guards: batches dealt to the ranks of one model, a loss divided by the number of processes, a norm of a rank's own,
    metrics that count every sample twice, and saves on one rank.
    """
    path = checkpoint(tmp_path_factory, "llama")
    more = {"gradient_accumulation_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    expected = run_plain(path, tmp_path / "plain", 4, adapters, **more)
    for found in pool2.run(run_sharded, path, tmp_path / "ranks", 4, 2, adapters, **more):
        compare(found, expected)
    same_files(tmp_path / "ranks/final", tmp_path / "plain/final")


def test_four_ranks_as_two_replicas_train_as_one_process(pool4, tmp_path_factory, tmp_path):
    """Guards: gradients summed over the replicas, or averaged over the shards; replicas that drift apart."""
    path = checkpoint(tmp_path_factory, "llama")
    # Where a last batch is not full, data parallelism fills it with samples of the first one: it counts other tokens.
    alike = {"samples": 20, "evaluated": 8}
    expected = run_plain(path, tmp_path / "plain", 4, **alike)
    for found in pool4.run(run_sharded, path, tmp_path / "ranks", 2, 2, **alike):
        compare(found, expected)
    same_files(tmp_path / "ranks/final", tmp_path / "plain/final")


def resumed(path: Path, folder: Path, adapters: bool) -> list[Run]:
    """On a rank: on from the checkpoint in the middle of this run, and from that of the run in one process."""
    middle = [folder / "checkpoint-6", folder / "plain/checkpoint-6"]
    return [run_sharded(path, folder / "again", 4, 2, adapters, resume=str(one)) for one in middle]


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_resumed_run_goes_on_as_it_would_have(pool2, tmp_path_factory, tmp_path, adapters):
    """Guards: an optimizer state of one rank's shards, or weights that are not read again; the checkpoints of one process and
    of several ranks are the same, so either goes on from the other's.
    """
    path = checkpoint(tmp_path_factory, "llama")
    pool2.run(run_sharded, path, tmp_path, 4, 2, adapters)
    run_plain(path, tmp_path / "plain", 4, adapters)
    same_files(tmp_path / "checkpoint-6", tmp_path / "plain/checkpoint-6")
    expected = run_plain(path, tmp_path / "again", 4, adapters, resume=str(tmp_path / "plain/checkpoint-6"))
    for runs in pool2.run(resumed, path, tmp_path, adapters):
        for found in runs:
            compare(found, expected)
    folders = (tmp_path / "checkpoint-6", tmp_path / "plain/checkpoint-6")
    ranks, plain = (torch.load(folder / "optimizer.pt") for folder in folders)
    assert ranks["state"].keys() == plain["state"].keys()
    for index, kept in plain["state"].items():
        for key, value in kept.items():
            torch.testing.assert_close(ranks["state"][index][key], value, atol=1e-4, rtol=1e-3)


def refused(path: Path, folder: Path) -> dict[str, str]:
    """On a rank: what each of these says."""
    model, found = load(path), {}

    def attempt(name: str, kind: type, **changes: Any) -> None:
        with pytest.raises((ShardwiseError, MismatchError)) as error:
            run(kind, model, folder, 4, **changes)
        found[name] = str(error.value)

    attempt("transformers", transformers.Trainer)
    attempt("adafactor", shardwise.Trainer, optim="adafactor")
    attempt("size", shardwise.Trainer, auto_find_batch_size=True)
    attempt("transformers afterwards", transformers.Trainer)
    workers = arguments(folder, 4, eval_strategy="no", dataloader_num_workers=2)
    loader = shardwise.Trainer(model=model, args=workers, train_dataset=Texts(8, 0)).get_train_dataloader()
    found["workers"] = str(loader.base_dataloader.worker_init_fn.keywords["rank"])
    trainer = shardwise.Trainer(
        model=model, args=arguments(folder, 4, eval_strategy="no"), train_dataset=Texts(8, dist.get_rank())
    )
    with pytest.raises(MismatchError) as error:
        trainer.train()
    return found | {"data": str(error.value)}


def test_what_would_give_other_numbers_is_refused(pool2, tmp_path_factory, tmp_path):
    """Guards: transformers' own Trainer on a parallel model, optimizers with statistics over whole matrices, and a dataset that
    is another one on every rank.
    """
    found, second = pool2.run(refused, checkpoint(tmp_path_factory, "llama"), tmp_path)
    assert found["workers"] == second["workers"] == "0"  # the seeds of the data loader's processes
    assert "shardwise.Trainer, which takes the same arguments" in found["transformers"]
    assert found["transformers afterwards"] == found["transformers"]
    assert "optim='adafactor'" in found["adafactor"]
    assert "auto_find_batch_size" in found["size"]
    assert "rank 1 was given another batch than rank 0" in found["data"]


class Stream(IterableDataset):
    """As many of the texts as asked for, one after the other: nobody knows the length before."""

    def __init__(self, count: int, seed: int) -> None:
        self.texts = Texts(count, seed)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter([self.texts[index] for index in range(len(self.texts))])


def scores(kind: type, make: Callable[[], Any], folder: Path, stream: bool) -> dict[str, float]:
    """What a trainer that makes its model itself finds in evaluation, of samples that are gathered as objects."""
    torch.manual_seed(0)
    trainer = kind(
        model_init=make,
        args=arguments(folder, 4, eval_use_gather_object=not stream, save_strategy="no", eval_strategy="no", max_steps=2),
        train_dataset=Texts(ODD, 0),
        eval_dataset=Stream(ODD, 1) if stream else Texts(ODD, 1),
        compute_metrics=accuracy,
    )
    trainer.train()
    metrics: dict[str, float] = trainer.evaluate()
    return metrics


def scores_sharded(path: Path, folder: Path, stream: bool) -> dict[str, float]:
    """On a rank."""
    return scores(shardwise.Trainer, lambda: load(path), folder, stream)


@pytest.mark.parametrize("stream", [False, True], ids=["objects", "stream"])
def test_evaluation_counts_as_one_process_does(stream, shm2, tmp_path_factory, tmp_path):
    """Guards: an accelerator that was made before `model_init` gave it a model, and deals other batches to each rank; tensors
    that are gathered row by row as objects, and then joined across; a last batch of a stream that weighs as much as a full one.
    """
    path = checkpoint(tmp_path_factory, "llama")
    expected = scores(transformers.Trainer, lambda: plain(path), tmp_path / "plain", stream)
    for found in shm2.run(scores_sharded, path, tmp_path / "ranks", stream):
        for key, value in expected.items():
            if not key.endswith(TIMES):
                assert found[key] == pytest.approx(value, rel=2e-4), key


def draws_when_resumed(path: Path, folder: Path) -> tuple[float, ...]:
    """On a rank: random numbers behind a run that goes on from one of fewer ranks, each of which left its random state."""
    draws = []
    for resume in (None, str(folder / "checkpoint-1")):
        model = load(path)
        random.seed(dist.get_rank()), np.random.seed(dist.get_rank()), torch.manual_seed(dist.get_rank())
        more = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "max_steps": 2}
        trainer = shardwise.Trainer(model=model, args=arguments(folder, 4, **more), train_dataset=Texts(12, 0))
        random.seed(dist.get_rank())
        trainer.train(resume_from_checkpoint=resume)
        draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        if dist.get_rank() == 0 and resume is None:
            assert (folder / "checkpoint-1/rng_state.pth").is_file()  # for one process
            (folder / "checkpoint-1/rng_state_1.pth").unlink()
        dist.barrier()
    return tuple(draws)


def test_ranks_resume_with_one_random_state(shm2, tmp_path_factory, tmp_path):
    """Guards: of more ranks than the earlier run had, some without its random state: from then on they drop out other elements
    of the same activations, and nobody notices.
    """
    first, second = shm2.run(draws_when_resumed, checkpoint(tmp_path_factory, "llama"), tmp_path)
    assert first == second


def full_disk(path: Path, folder: Path, what: str) -> str:
    """On a rank: what a trainer says when the first rank, which alone writes it, cannot write a file."""
    more = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "max_steps": 1}
    trainer = shardwise.Trainer(model=load(path), args=arguments(folder / what, 4, **more), train_dataset=Texts(12, 0))
    own = torch.save

    def save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if dist.get_rank() == 0 and what in str(file):
            raise OSError(28, "No space left on device")
        own(content, file, *args, **kwargs)

    torch.save = save
    try:
        with pytest.raises((OSError, MismatchError)) as error:
            trainer.train()
    finally:
        torch.save = own
    return str(error.value)


@pytest.mark.parametrize("what", ["training_args", "optimizer", "rng_state"])
def test_a_disk_that_is_full(what, shm2, tmp_path_factory, tmp_path):
    """Guards: the ranks that write nothing waiting at a barrier for one that has raised."""
    first, second = shm2.run(full_disk, checkpoint(tmp_path_factory, "llama"), tmp_path, what)
    assert "No space left" in first
    assert "failed on rank 0" in second


def test_ordinary_model_is_trained_as_ever(tmp_path_factory, tmp_path):
    """Guards: a Trainer of ours that changes the training of a model that is not parallel."""
    path = checkpoint(tmp_path_factory, "llama")
    found = run(shardwise.Trainer, plain(path), tmp_path / "ours", 4, num_train_epochs=1)
    compare(found, run_plain(path, tmp_path / "plain", 4, num_train_epochs=1))
