"""`shardwise.Trainer`: the loss curve, norms, metrics and checkpoints of one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
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


TRAIN, EVAL = Texts(21, 0), Texts(7, 1)  # neither is a multiple of any batch size


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


def run(kind: type, model: Any, folder: Path, batch: int, resume: str | None = None, **changes: Any) -> Run:
    """Train, evaluate and predict."""
    trainer = kind(
        model=model,
        args=arguments(folder, batch, **changes),
        train_dataset=TRAIN,
        eval_dataset=EVAL,
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    predicted = trainer.predict(EVAL).predictions
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
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return run(transformers.Trainer, lora(model) if adapters else model, folder, batch, **changes)


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
    assert sorted(path.name for path in expected.iterdir()) == sorted(path.name for path in found.iterdir())
    for file in expected.glob("*.safetensors"):
        mine, wanted = load_file(found / file.name), load_file(file)
        assert mine.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(mine[key], wanted[key], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", ["llama"])
def test_two_ranks_train_as_one_process(pool2, tmp_path_factory, tmp_path, name, adapters):
    """Guards: batches dealt to the ranks of one model, a loss divided by the number of processes, a norm of a rank's own,
    metrics that count every sample twice, and saves on one rank.
    """
    path = checkpoint(tmp_path_factory, name)
    expected = run_plain(path, tmp_path / "plain", 4, adapters, gradient_accumulation_steps=2)
    for found in pool2.run(run_sharded, path, tmp_path / "ranks", 4, 2, adapters, gradient_accumulation_steps=2):
        compare(found, expected)
    same_files(tmp_path / "ranks/final", tmp_path / "plain/final")


def test_four_ranks_as_two_replicas_train_as_one_process(pool4, tmp_path_factory, tmp_path):
    """Guards: gradients summed over the replicas, or averaged over the shards; replicas that drift apart."""
    path = checkpoint(tmp_path_factory, "llama")
    expected = run_plain(path, tmp_path / "plain", 4)
    for found in pool4.run(run_sharded, path, tmp_path / "ranks", 2, 2):
        compare(found, expected)
    same_files(tmp_path / "ranks/final", tmp_path / "plain/final")
