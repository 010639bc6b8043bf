"""Who runs a step: Megatron-Core or DeepSpeed, behind the protocol that the training loop knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from megatron_spdf.model.batch import MicroBatch


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, the same on every rank.

    Attributes:
        loss: mean over the tokens of the global batch, before the update.
        grad_norm: global, before clipping.
        skipped: loss or gradient was not finite, so weights and optimizer state are as before.
        stop: some rank was asked to stop (`stop_requested`).
    """

    loss: float
    grad_norm: float
    skipped: bool
    stop: bool


class Engine(Protocol):
    """A model with its optimizer, laid out over the ranks.

    Attributes:
        models: this rank's model chunks.
        needs_batches: whether this rank needs tokens.
        data_parallel_rank: which replica of its shard this rank holds.
        optimizer_steps: updates done, skipped steps not counted.
        learning_rate: of the last step.
        choices: which implementation computes what, for the log.
    """

    models: list[nn.Module]
    needs_batches: bool
    data_parallel_rank: int
    optimizer_steps: int

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
        """Bytes of parameters, gradients and optimizer state on this rank, after the first step."""

    def measured_sparsity(self) -> dict[str, float]:
        """Fraction of zeros of every sparse weight as expanded: canonical name -> sparsity, on
        every rank."""

    def sharded_state(self, loading: bool) -> dict:
        """Weights, mask bits and optimizer state as Megatron-Core's sharded tensors, to load into
        or to save: then copies on the CPU, which later steps do not change, of what this rank saves
        for the others too."""

    def load_state(self, loaded: dict, optimizer_steps: int) -> None:
        """Takes a filled `sharded_state(loading=True)`."""

    def close(self) -> None:
        """Frees what the engine holds, to make room for another; it is of no use afterwards."""

