"""Loss on the fixed validation windows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from megatron_spdf.engine.base import Engine
from megatron_spdf.model.batch import MicroBatch


class Validation(NamedTuple):
    """Mean loss over batches, and its standard error by their spread, in nats per token; None for
    one batch, and where losses are not finite."""

    loss: float
    standard_error: float | None

    @classmethod
    def of(cls, losses: list[float]) -> Validation:
        """Makes it of the losses of batches."""
        known = len(losses) > 1 and all(map(math.isfinite, losses))
        return cls(sum(losses) / len(losses),
                   statistics.stdev(losses) / math.sqrt(len(losses)) if known else None)


def validation_loss(
    engine: Engine, batches: Iterable[list[MicroBatch]], stop_requested: Callable[[], bool]
) -> Validation | None:
    """Mean loss in nats per token over the batches. Perplexity is its exponential.

    Args:
        engine: holds the model.
        batches: this rank's micro-batches of each validation batch.
        stop_requested: asked before each batch.

    Returns:
        The loss and its standard error; None if a rank was asked to stop before the end.
    """
    losses = []
    for batch in batches:
        loss, stop = engine.evaluate(batch, stop_requested())
        if stop:
            return None
        losses.append(loss)
    return Validation.of(losses)


def perplexity(loss: float) -> float | None:
    """Exponential of a loss in nats per token; None where it is no finite number, as of a model
    that has diverged."""
    try:
        value = math.exp(loss)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """Converts a loss in nats per token to bits per byte of UTF-8 text, which compares across
    tokenizers."""
    return loss / math.log(2) * tokens_per_byte
