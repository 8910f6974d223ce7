"""`estimate`: what a step takes on a rank, before any weight is read."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from transformers import PreTrainedConfig

from shardwise.estimate.kinds import first_layers
from shardwise.estimate.result import Estimate
from shardwise.estimate.simulate import Setting, Simulation, simulate
from shardwise.estimate.step import OPTIMIZERS, OptimizerName, Step
from shardwise.hf import config_parts
from shardwise.mesh import device_type
from shardwise.plan import Plan
from shardwise.planning import PlanLike, make_plan


def estimate(
    config: PreTrainedConfig,
    tp_size: int,
    plan: PlanLike = "auto",
    *,
    batch: int = 1,
    sequence: int = 2048,
    training: bool = True,
    optimizer: OptimizerName = "adamw",
    dtype: torch.dtype | None = None,
    ep_size: int | None = None,
    sequence_parallel: bool = False,
    checkpointing: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
) -> Estimate:
    """What each of `tp_size` ranks would hold and send in a step of `batch` x `sequence` tokens.

    Nothing is read or allocated: the model's own code runs once, as the first rank of a process group in which nobody else
    is, on tensors that have a shape and no memory. Every storage and every collective is followed.

    What that does not see: memory that a kernel takes for itself, what an allocator rounds up or can't reuse, and the
    communication library's buffers.

    Args:
        config: of the model; its weights are not looked at.
        tp_size, plan, ep_size: as for `shardwise.plan`.
        batch: sequences that a rank computes at once.
        sequence: tokens of each.
        training: forward, backward and an optimizer's step; else a prefill of that many tokens into a KV cache.
        optimizer: "adamw" (two states of each parameter's dtype), "sgd" (none), or "none" (no step).
        dtype: of the parameters; by default what the config says, else float32.
        sequence_parallel: as for `shardwise.parallelize`.
        checkpointing: activation checkpointing, layer by layer.
        device: whose attention kernels and optimizer; by default this machine's. Either can be asked for anywhere.

    Raises:
        PlanError: the plan can't be carried out.
        MeshError: this process has a default process group already, which the simulation would need.
        SimulationError: the model's code asks for values that there are none of. `shardwise.plan` works none the less.
    """
    step = Step(batch, sequence, training, optimizer, checkpointing, device or ("cpu" if device_type() == "cpu" else "cuda"))
    config = config if dtype is None else in_dtype(config, dtype)
    table = make_plan(config, tp_size, plan, ep_size=ep_size)
    found = simulate(Setting(config, tp_size, table, ep_size, sequence_parallel), step, first_layers(table))
    return _result(table, step, found)


def in_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    """A copy of `config`, and of the configs in it, whose models have parameters of `dtype`."""
    other = copy.deepcopy(config)
    for part in config_parts(other):
        part.dtype = dtype
    return other


def _result(table: Plan, step: Step, found: Simulation) -> Estimate:
    parameters = sum(found.held.values()) + found.buffers
    kept = OPTIMIZERS[step.optimizer].state_bytes(found.held) if step.training else 0
    peaks = {phase: parameters + kept + moment.total for phase, moment in found.peaks.items()}
    if step.training and step.optimizer != "none":
        taken = OPTIMIZERS[step.optimizer].step_bytes(found.held, step.device)
        peaks["optimizer"] = parameters + kept + found.gradients + taken
    worst = max(peaks, key=lambda phase: peaks[phase])
    return Estimate(
        model=found.model,
        plan=table,
        step=step,
        parameters=parameters,
        gradients=found.gradients,
        optimizer=kept,
        cache=found.cache,
        activations=max(moment.total - moment.gradients for moment in found.peaks.values()) - found.cache,
        peak=peaks[worst],
        peak_in=worst,
        attention=found.kernels,
        collectives=found.collectives,
        flows=found.flows,
    )
