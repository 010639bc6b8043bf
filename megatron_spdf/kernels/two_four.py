"""Products with a 2:4 weight on sparse tensor cores, through the kernels that PyTorch brings.

Both libraries behind them take the active values of each row, (rows, columns / 2), beside metadata
that say where they are. The compact values of a weight are such a matrix as they lie, or slice
beside slice; those of its transpose are the same values in another order. Masks are static, so
metadata and order are made once. cuSPARSELt holds values and metadata in one array, of nine
sixteenths of the dense weight; it writes its result transposed, as we want it. CUTLASS' kernels are
for compute capability 8.x and nothing else, and their result is transposed by a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from megatron_spdf.kernels.dispatch import DENSE, say_once
from megatron_spdf.kernels.mask import Mask, positions
from megatron_spdf.text import first_line

DTYPES = (torch.bfloat16, torch.float16)  # TF32 would be 1:2
SIDE, TOKENS = 64, 8  # what both axes of a weight, and the tokens, must be multiples of


@dataclass(frozen=True)
class TwoFourTable:
    """What multiplying by a 2:4 weight on sparse tensor cores needs beside its values.

    Attributes:
        metadata, transposed: where the active entries of the weight (out, in), and of its
            transpose, are; as a library wants it.
        order: (active entries,) int32: the place among the values of each active entry of the
            transpose, row by row.
    """

    metadata: Tensor
    transposed: Tensor
    order: Tensor


class Library(Protocol):
    """Multiplies by a 2:4 weight W (rows, columns)."""

    NAME: str

    def metadata(self, pattern: Tensor, dtype: torch.dtype) -> Tensor:
        """Where the active entries are; of `pattern` (rows, columns) bool, for values of a dtype.
        Integers."""

    def multiply(self, values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        """x W^T, (N, rows) contiguous, of x (N, columns) and the values (rows, columns / 2)."""


class CuSparseLt:
    NAME = "cuSPARSELt"

    def metadata(self, pattern: Tensor, dtype: torch.dtype) -> Tensor:
        ones = pattern.to(dtype).contiguous()
        return torch._cslt_compress(ones).flatten().view(torch.int16)[ones.numel() // 2 :].clone()

    def multiply(self, values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        packed = torch.cat([values.reshape(-1), metadata.view(values.dtype)])
        # as compressing gives it: rows say how many, columns nothing
        packed = packed.view(len(values), -1)
        return torch._cslt_sparse_mm(packed, x.contiguous().T, transpose_result=True)


class Cutlass:
    NAME = "CUTLASS"

    def metadata(self, pattern: Tensor, dtype: torch.dtype) -> Tensor:
        return sparse_semi_structured_from_dense_cutlass(pattern.to(dtype).contiguous())[1]

    def multiply(self, values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        return torch._sparse_semi_structured_mm(values.contiguous(), metadata,
                                                x.contiguous().T).T.contiguous()


class CompressedEachTime:
    """cuSPARSELt, handed the expanded weight for every product: it promises nothing about where in
    its array it keeps the values, and where that is not first they cannot be put there."""

    NAME = "cuSPARSELt, compressed anew for each product"

    def metadata(self, pattern: Tensor, dtype: torch.dtype) -> Tensor:
        return pattern.contiguous()

    def multiply(self, values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        weight = values.new_zeros(metadata.shape).masked_scatter_(metadata, values)
        return torch._cslt_sparse_mm(torch._cslt_compress(weight), x.contiguous().T,
                                     transpose_result=True)


# in the order they are tried in
LIBRARIES: tuple[Library, ...] = (CuSparseLt(), Cutlass(), CompressedEachTime())


def fits(shape: tuple[int, int]) -> bool:
    """Whether the libraries take a weight of this shape, and its transpose."""
    return not any(n % SIDE for n in shape)


def find_two_four(
    bits: Tensor, slice_shape: tuple[int, int], axis: int, library: Library, dtype: torch.dtype
) -> TwoFourTable:
    """The tables of a 2:4 mask for a library, on the device of its bits."""
    places = positions(bits, slice_shape, axis)
    rows, columns = (n * (len(bits) if i == axis else 1) for i, n in enumerate(slice_shape))
    pattern = torch.zeros(rows * columns, dtype=torch.bool, device=bits.device)
    pattern[places] = True
    pattern = pattern.view(rows, columns)
    order = (places % columns * rows + places // columns).argsort()
    return TwoFourTable(library.metadata(pattern, dtype), library.metadata(pattern.T, dtype),
                   order.int())


def packed(values: Tensor, mask: Mask) -> Tensor:
    """The active values of each row of the weight, (out, in / 2): as they lie, or of slices side by
    side."""
    rows, columns = mask.shape
    if mask.axis == 0:
        return values.reshape(rows, columns // 2)
    return values.reshape(mask.slices, rows, -1).transpose(0, 1).reshape(rows, columns // 2)


def packed_transposed(values: Tensor, mask: Mask) -> Tensor:
    """The active values of each column of the weight, (in, out / 2)."""
    rows, columns = mask.shape
    return values.reshape(-1).index_select(0, mask.tables.order).view(columns, rows // 2)


def try_out(library: Library, device: torch.device, dtype: torch.dtype) -> None:
    """Raises where a library does not compute what a dense product does. Small whole numbers, so
    that both are exact in any order of the sums."""
    draw = torch.Generator().manual_seed(0)
    places = torch.rand(64, 32, 4, generator=draw).argsort(-1) < 2
    weight = torch.randint(1, 3, (64, 128), generator=draw) * places.view(64, 128)
    x = torch.randint(-1, 2, (16, 128), generator=draw).to(device, dtype)
    values = weight[weight != 0].view(64, 64).to(device, dtype)
    found = library.multiply(values, library.metadata((weight != 0).to(device), dtype), x)
    if not torch.equal(found, x @ weight.to(device, dtype).T):
        raise RuntimeError("it computes something else than a dense product")


@cache
def two_four_products(device: str, dtype: torch.dtype) -> tuple[Library | None, str]:
    """What multiplies with 2:4 weights on sparse tensor cores, None where nothing does; and its
    name, or why.

    Args:
        device: as of `implementation`.
    """
    if device != "cuda":
        return None, DENSE
    if dtype not in DTYPES:
        return None, f"{DENSE}, since sparse tensor cores are for 16 bits here, not {dtype}"
    said = []
    for library in LIBRARIES:
        try:
            try_out(library, torch.device(device), dtype)
            return library, library.NAME
        except (
            Exception
        ) as error:  # whatever a library, a driver or a GPU it does not know may raise
            said.append(
                f"{library.NAME} does not work here ({type(error).__name__}: {first_line(error)})"
            )
    return None, f"{DENSE}, since {' and '.join(said)}"


def two_four_library(dense: Tensor) -> Library | None:
    """What multiplies with a 2:4 weight that stands for this dense one, None where it is
    expanded."""
    library, _ = two_four_products(dense.device.type, dense.dtype)
    if library is None or fits(dense.shape):
        return library
    say_once(f"a 2:4 weight {dense.shape[0]} x {dense.shape[1]} is {DENSE}: {library.NAME} is "
              f"asked for multiples of {SIDE} along both axes only")
    return None
