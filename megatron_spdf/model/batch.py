"""A micro-batch: tensors by name."""

from __future__ import annotations

from torch import Tensor

MicroBatch = dict[str, Tensor]
