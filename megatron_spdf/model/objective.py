"""What a decoder computes where tokens have weights: a loss of what goes into its LM head.

An objective takes the place of `cross_entropy` as a decoder's `objective`, and is called once a
micro-batch.

Shapes: T tokens of a sequence, B sequences, H hidden, rows of the vocabulary on this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from megatron_spdf.model.head import head_loss


@dataclass(frozen=True)
class HeadInputs:
    """What a loss is computed of.

    Attributes:
        x: (T, B, H) of the LM head, the same on every tensor-parallel rank.
        weight: (rows, H), this rank's rows of the LM head.
        labels, token_weights: (B, T), see `head_loss`.
        vocab_size: without the rows that pad the embedding.
        smoothing: of labels.
        read: tokens, positions and attention mask, as the decoder was called with them.
        trains: whether the decoder is in training mode; else the loss is to be cross entropy.
    """

    x: Tensor
    weight: Tensor
    labels: Tensor
    token_weights: Tensor
    vocab_size: int
    smoothing: float
    read: tuple[Any, Any, Any]
    trains: bool


class Objective(Protocol):
    """Loss of a micro-batch, ()."""

    def __call__(self, inputs: HeadInputs) -> Tensor: ...


class Composite(ABC):
    """Objective that is a sum of several losses, which it keeps apart for the log.

    Attributes:
        parts: their names in the log.
    """

    parts: ClassVar[tuple[str, ...]]

    @abstractmethod
    def __call__(self, inputs: HeadInputs) -> Tensor:
        """Loss of a micro-batch, ()."""

    @abstractmethod
    def take(self) -> Tensor:
        """Returns the mean of each part over the micro-batches since the last call, (parts,)."""

    @property
    @abstractmethod
    def held(self) -> int:
        """Bytes of weights that the losses need beside the model's, on this rank."""


def cross_entropy(inputs: HeadInputs) -> Tensor:
    """Sum over tokens of token weight x cross entropy, see `head_loss`."""
    return head_loss(inputs.x, inputs.weight, inputs.labels, inputs.token_weights,
                     inputs.vocab_size, inputs.smoothing)
