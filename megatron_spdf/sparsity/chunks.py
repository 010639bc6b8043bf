"""Between a dense weight and the chunks it is cut into along its tensor-parallel axis."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_spdf.sparsity.plan import SparseWeight


def chunk_of(weight: Tensor, planned: SparseWeight, number: int) -> Tensor:
    """Entries of one chunk of a dense weight (out, in), in row-major order: (entries,)."""
    size = planned.chunk_shape[planned.axis]
    return weight.narrow(planned.axis, number * size, size).reshape(-1)


def join_chunks(chunks: Tensor, planned: SparseWeight) -> Tensor:
    """Dense weight (out, in) from its chunks (C, entries)."""
    return torch.cat(list(chunks.view(planned.chunks, *planned.chunk_shape)), dim=planned.axis)
