"""In place of the libraries for sparse tensor cores: on the CPU, from the same values and
metadata."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

PADDED = 3  # 16-bit words for each row


class StandIn:
    """A library whose metadata are CUTLASS', and which multiplies in any precision.

    Attributes:
        products: how many there were.
    """

    NAME = "stand-in"

    def __init__(self):
        self.products = 0

    def metadata(self, pattern: Tensor, dtype: torch.dtype) -> Tensor:
        return sparse_semi_structured_from_dense_cutlass(pattern.to(torch.bfloat16).contiguous())[1]

    def multiply(self, values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        self.products += 1
        ones = torch.ones(values.shape, dtype=torch.bfloat16)
        pattern = sparse_semi_structured_to_dense_cutlass(ones, metadata) != 0
        weight = torch.zeros(pattern.shape, dtype=values.dtype)
        weight[pattern] = values.reshape(-1)
        return x @ weight.T


class AsCusparseLt:
    """PyTorch's operations as cuSPARSELt and CUTLASS serve them, which know the strides of what
    they are handed."""

    @classmethod
    def install(cls, monkeypatch) -> None:
        for name in ("_cslt_compress", "_cslt_sparse_mm", "_sparse_semi_structured_mm"):
            monkeypatch.setattr(torch, name, getattr(cls, name))

    @staticmethod
    def _cslt_compress(dense: Tensor) -> Tensor:
        """Values, then metadata of a sixteenth as many 16-bit words as the dense matrix has
        entries, and what the library pads them with: one array after the other, handed out as a
        matrix of as many rows as the dense one."""
        assert dense.is_contiguous()
        values, metadata = sparse_semi_structured_from_dense_cutlass(dense)
        padding = values.new_zeros(PADDED * len(dense))
        return torch.cat([values.flatten(), metadata.flatten().view(dense.dtype),
                          padding]).view(len(dense), -1)

    @staticmethod
    def _cslt_sparse_mm(packed: Tensor, dense: Tensor, transpose_result: bool = False,
                        alg_id: int = 0) -> Tensor:
        """The packed matrix says by its rows how many the weight has, and how many columns by the
        other operand."""
        assert dense.T.is_contiguous() and packed.is_contiguous() and packed.dim() == 2
        rows, columns = len(packed), len(dense)
        sizes = [rows * columns // 2, rows * columns // 16, PADDED * rows]
        values, metadata, _ = packed.flatten().split(sizes)
        weight = sparse_semi_structured_to_dense_cutlass(
            values.view(rows, -1), metadata.view(torch.int16).view(rows, -1))
        result = weight @ dense
        return result.T.contiguous() if transpose_result else result

    @staticmethod
    def _sparse_semi_structured_mm(values: Tensor, metadata: Tensor, dense: Tensor) -> Tensor:
        assert values.is_contiguous() and dense.T.is_contiguous()
        return (sparse_semi_structured_to_dense_cutlass(values, metadata) @ dense).contiguous()
