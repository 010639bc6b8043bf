"""Who runs a step: Megatron-Core or DeepSpeed, behind the protocol that the training loop knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_spdf.model.batch import MicroBatch
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, the same on every rank.

    Attributes:
        loss: mean over the tokens of the global batch, before the update.
        grad_norm: global, before clipping.
        skipped: loss or gradient was not finite, so weights and optimizer state are as before.
        stop: some rank was asked to stop (`stop_requested`).
        parts: of a loss that is a sum of several, each before it is weighed, by name.
    """

    loss: float
    grad_norm: float
    skipped: bool
    stop: bool
    parts: Mapping[str, float] = field(default_factory=dict)


class ParameterState(Protocol):
    """The optimizer's fp32 state of this rank's parameters, whole, whatever is sharded.

    Attributes:
        names: of the states: "param", the master weight, and those that the optimizer names.
    """

    names: tuple[str, ...]

    def whole(self, name: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """One state of every parameter, of its shape: not to be written to, and of use until the
        next is asked for. All data-parallel ranks iterate together, to the end."""

    def put(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Sets one state of a parameter; all data-parallel ranks give the same value."""

    def settle(self) -> None:
        """Sets the weights that the model computes with to their masters; on all ranks, after
        `put`."""


class Engine(Protocol):
    """A model with its optimizer, laid out over the ranks.

    Attributes:
        recipe, plan, device: built for.
        models: this rank's model chunks.
        state: the optimizer's, parameter by parameter.
        torch_optimizer: the one that updates this rank's masters.
        needs_batches: whether this rank needs tokens.
        data_parallel_rank: which replica of its shard this rank holds.
        optimizer_steps: updates done, skipped steps not counted.
        learning_rate: of the last step.
        choices: which implementation computes what, for the log.
        timed: calls of the engine, "attribute.method", whose time a benchmark counts -> "forward",
            "backward", "optimizer" or "communication".
    """

    recipe: Recipe
    plan: Plan
    device: torch.device
    models: list[nn.Module]
    state: ParameterState
    needs_batches: bool
    data_parallel_rank: int
    optimizer_steps: int
    timed: Mapping[str, str]

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def choices(self) -> str: ...

    def step(self, batch: Sequence[MicroBatch], number: int, tokens: int,
             stop_requested: bool) -> StepResult:
        """One optimizer step, the `number`th of the run from 1, ending at `tokens` tokens of the
        schedule."""

    def evaluate(self, batch: Sequence[MicroBatch], stop_requested: bool) -> tuple[float, bool]:
        """Mean loss of a global batch, and whether some rank was asked to stop."""

    def state_bytes(self) -> dict[str, int]:
        """Bytes of parameters, gradients, optimizer state and, beside it, a teacher on this rank,
        after the first step."""

    def measured_sparsity(self) -> dict[str, float]:
        """Fraction of zeros of every sparse weight as expanded: canonical name -> sparsity, on
        every rank."""

    def state_to_save(self) -> dict:
        """Weights, mask bits and optimizer state as Megatron-Core's sharded tensors: copies on the
        CPU, which later steps do not change, of what this rank saves for its replicas too."""

    def state_to_load(self) -> dict:
        """Sharded tensors like those of `state_to_save`, for a checkpoint to be read into."""

    def load_state(self, loaded: dict, optimizer_steps: int) -> None:
        """Takes a filled `state_to_load()`."""

    def close(self) -> None:
        """Frees what the engine holds, to make room for another; it is of no use afterwards."""

