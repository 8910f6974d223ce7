"""transformers' Trainer on a parallel model: the loss curve, norms, metrics and checkpoints of one process.

What it changes is what concerns several ranks of one model, and all of it by overriding what Trainer's subclasses override:

| | transformers | here |
|---|---|---|
| batches | another one for each process | for each replica: the ranks of one model get the same |
| gradients | the mean over processes (DDP) | the mean over replicas |
| clipping | the norm of a process's own | the norm of the whole model |
| metrics | gathered from all processes | from one rank of each replica |
| checkpoints | the first process's state | the whole model's, and the whole optimizer's |

An ordinary model is trained as transformers does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import Trainer as TransformersTrainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from shardwise.errors import MismatchError, ShardwiseError, describe
from shardwise.loading import load_weights
from shardwise.model_state import ModelState, parallel_parts
from shardwise.random_state import same_random_state
from shardwise.replicas import checksum, first_difference, together
from shardwise.training import (
    average_gradients,
    clip_grad_norm_,
    copy_first_replica,
    full_optimizer_state,
    load_full_optimizer_state,
)
from shardwise.training.accelerator import count_last_batch, count_replicas, counts_replicas, replicas
from shardwise.training.random_states import copy_for_one_process, load_random_state

_ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adamw_anyprecision", "lion_32bit")


class TrainerMixin:
    """In front of a Trainer, `class MyTrainer(shardwise.TrainerMixin, SFTTrainer)`, for models of shardwise.

    Every process runs the same script. Raises `ShardwiseError` for what would give other numbers than in one process.
    """

    accelerator: Any
    model: Any
    args: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batch_seen = False
        if self._state is not None:
            _check_arguments(self)
            if not counts_replicas(self.accelerator):  # the model came of `model_init`, after the accelerator
                self.create_accelerator_and_postprocess()
            # The model is prepared without DDP, every rank takes part in saving, and `_sync_...` below is called.
            self.is_distributed_loading_by_transformers = True

    @property
    def _state(self) -> ModelState | None:
        """The table and the axes of the model; None of an ordinary one."""
        model = getattr(self, "model", None)
        return next((state for state, _ in parallel_parts(model)), None) if isinstance(model, nn.Module) else None

    # --- what is set up ---

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        with _allowed(self.model):
            arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)  # type: ignore[misc]
        return arguments

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        state, accelerator = self._state, self.accelerator
        if state is not None:
            count_replicas(accelerator, state.mesh)
            as_objects = self.args.eval_use_gather_object
            self.gather_function = partial(accelerator.gather_for_metrics, use_gather_object=as_objects)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        self._together("making the repository on the hub", partial(super().init_hf_repo, *args, **kwargs))  # type: ignore[misc]

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        state = self._state
        if state is None:
            super()._sync_replicated_trainable_parameters(model)  # type: ignore[misc]
        else:
            copy_first_replica(model, state.mesh)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)  # type: ignore[misc]
        inner = getattr(loader, "base_dataloader", loader)
        seed = getattr(inner, "worker_init_fn", None)
        if self._state is not None and isinstance(seed, partial) and "rank" in seed.keywords:
            # Workers of the ranks of one model draw the same random numbers.
            inner.worker_init_fn = partial(seed.func, *seed.args, **{**seed.keywords, "rank": self._replica})
        return loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples a step, of all replicas."""
        state, total = self._state, super().get_total_train_batch_size(args)  # type: ignore[misc]
        return int(total) if state is None else int(total) // state.mesh.size()

    @property
    def _replica(self) -> int:
        index: int = self.accelerator.process_index
        return index

    # --- a step ---

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers'; the last micro-batch's step ends with the mean of the gradients over the replicas."""
        state = self._state
        if state is not None and not self._batch_seen:
            _check_same_batch(inputs, state)
            self._batch_seen = True
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if state is not None and self.accelerator.sync_gradients:
            average_gradients(self.model, state.mesh)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._state is None:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        return clip_grad_norm_(self.model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._state is not None:
            grad_norm = clip_grad_norm_(self.model, float("inf"))
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

    def floating_point_ops(self, inputs: Any) -> float:
        """This rank's share of those of its replica, which the ranks add up."""
        state, total = self._state, super().floating_point_ops(inputs)  # type: ignore[misc]
        return float(total) if state is None else float(total) / state.mesh.size()

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._state is not None and self.accelerator.num_processes == 1:
            count_last_batch(self.accelerator, inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    # --- checkpoints ---

    def _together(self, what: str, make: Callable[[], None]) -> None:
        """Call `make`, whose own collectives fail on all ranks or on none; where it fails on one, it fails on all."""
        if self._state is None:
            make()
        else:
            together(None, f"Trainer: {what}", make)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._together("saving a checkpoint", partial(super()._save_checkpoint, *args, **kwargs))  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._state is not None and not isinstance(self.model, _savable()):
            raise ShardwiseError(
                describe(
                    f"Trainer cannot save a {type(self.model).__name__} around a parallel model.",
                    either=['save_strategy="no", and save its parts yourself, or', "train the transformers model itself"],
                )
            )
        folder = self.args.output_dir if output_dir is None else output_dir
        self._together(f"making {folder}", partial(_make_folder, folder, self.args.should_save))
        self._together("saving the model", partial(super()._save, output_dir, state_dict=state_dict))  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._state is None:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        full = full_optimizer_state(self.model, self._plain_optimizer)

        def write() -> None:
            if self.args.should_save:
                torch.save(full, os.path.join(output_dir, OPTIMIZER_NAME))
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

        self._together("saving the optimizer's state", write)

    def _save_rng_state(self, output_dir: str) -> None:
        def write() -> None:
            super(TrainerMixin, self)._save_rng_state(output_dir)  # type: ignore[misc]
            if self._state is not None and self.args.should_save and self.accelerator.num_processes == 1:
                copy_for_one_process(output_dir)

        self._together("saving the random state", write)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        state = self._state
        if state is None or checkpoint is None:
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
        else:
            load_random_state(checkpoint, replicas(state.mesh)[self._replica][0])
            same_random_state(state.mesh)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._state is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        optimizer, scheduler = (os.path.join(checkpoint, name) for name in (OPTIMIZER_NAME, SCHEDULER_NAME))
        if os.path.isfile(optimizer) and os.path.isfile(scheduler):
            full = torch.load(optimizer, map_location="cpu", mmap=True, weights_only=True)
            load_full_optimizer_state(self.model, self._plain_optimizer, full)
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        wrapped = self.optimizer
        inner: torch.optim.Optimizer = getattr(wrapped, "optimizer", wrapped)
        return inner

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._reads_shards(resume_from_checkpoint):
            load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self._reads_shards(best):
            load_weights(self.model, best)
        else:
            super()._load_best_model()  # type: ignore[misc]

    def _reads_shards(self, folder: str) -> bool:
        whole = isinstance(self.model, PreTrainedModel) and self._state is not None
        return whole and os.path.isfile(os.path.join(folder, "config.json"))


class Trainer(TrainerMixin, TransformersTrainer):  # type: ignore[misc]
    """transformers' Trainer for models of shardwise, with the same arguments. See `TrainerMixin`."""


@contextmanager
def _allowed(model: nn.Module | None) -> Iterator[None]:
    """In here a parallel model does not refuse its Trainer."""
    parts = [part for _, part in parallel_parts(model)] if isinstance(model, nn.Module) else []
    for part in parts:
        part.__dict__["_trainer"] = True
    try:
        yield
    finally:
        for part in parts:
            del part.__dict__["_trainer"]


def _check_arguments(trainer: Any) -> None:
    """Raise `ShardwiseError` for arguments that would give other numbers than in one process."""
    args = trainer.args
    if not hasattr(TransformersTrainer, "_sync_replicated_trainable_parameters"):
        raise ShardwiseError("shardwise.Trainer needs a newer transformers (tested with 5.23): train in a loop of your own.")
    optimizer = str(getattr(args.optim, "value", args.optim))
    wrong = {
        "fp16=True": (args.fp16, "bf16=True: a loss scale of each rank's own would let ranks skip steps alone"),
        "fsdp=...": (args.fsdp, "leave it out"),
        "deepspeed=...": (args.deepspeed, "leave it out"),
        "parallelism_config=...": (args.parallelism_config, "leave it out: the model knows its axes"),
        "enable_jit_checkpoint=True": (
            args.enable_jit_checkpoint,
            "save_strategy='steps': a signal reaches ranks in different steps",
        ),
        "auto_find_batch_size=True": (args.auto_find_batch_size, "choose per_device_train_batch_size"),
        "train_sampling_strategy='batch_rebalance'": (
            str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)) == "batch_rebalance",
            "another strategy",
        ),
        f"optim={optimizer!r}": (
            trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None and optimizer not in _ELEMENTWISE,
            f"one of {', '.join(_ELEMENTWISE)}, or an optimizer of your own: optimizers=(optimizer, scheduler)",
        ),
    }
    for name, (given, instead) in wrong.items():
        if given:
            raise ShardwiseError(describe(f"shardwise.Trainer: {name} is not possible for a parallel model.", either=[instead]))
    replicas(next(state.mesh for state, _ in parallel_parts(trainer.model)))


def _make_folder(folder: str, here: bool) -> None:
    if here:
        os.makedirs(folder, exist_ok=True)


def _check_same_batch(inputs: Any, state: ModelState) -> None:
    """Raise `MismatchError` where the ranks of one model were given different batches. Collective."""
    tensors = [value for _, value in sorted(inputs.items()) if isinstance(value, Tensor)] if isinstance(inputs, dict) else []
    found = torch.tensor([sum((i + 1) * checksum(tensor) for i, tensor in enumerate(tensors)) % 2**61])
    if (rank := first_difference(found, state.mesh)) is not None:
        raise MismatchError(
            describe(
                f"Trainer: rank {rank} was given another batch than rank 0 of the same model.",
                either=[
                    "seed the ranks alike before the dataset and the collator draw random numbers, or",
                    "take the process's rank out of the dataset: the Trainer deals batches to replicas itself",
                ],
            )
        )


def _savable() -> tuple[type, ...]:
    try:
        from peft import PeftModel
    except ImportError:
        return (PreTrainedModel,)
    return (PreTrainedModel, PeftModel)
