"""Loss on the fixed validation windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from megatron_spdf.engine.base import Engine
from megatron_spdf.model.batch import MicroBatch


def validation_loss(
    engine: Engine, batches: Iterable[list[MicroBatch]], stop_requested: Callable[[], bool]
) -> float | None:
    """Mean loss in nats per token over the batches; None when some rank was asked to stop on the
    way.

    Perplexity is its exponential.
    """
    losses = []
    for batch in batches:
        loss, stop = engine.evaluate(batch, stop_requested())
        if stop:
            return None
        losses.append(loss)
    return sum(losses) / len(losses)


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """A loss in nats per token as bits per byte of UTF-8 text, which compares across tokenizers."""
    return loss / math.log(2) * tokens_per_byte
