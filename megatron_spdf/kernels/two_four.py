"""Products with a 2:4 weight on sparse tensor cores, by the kernels of PyTorch.

Its two libraries take the active values of each row, (rows, columns / 2), and metadata with their
places. The compact values of a weight are such a matrix as they are, or with slices side by side.
Those of its transpose are the same values in another order. Metadata and order are derived once a
mask. cuSPARSELt holds values and metadata in one array of nine sixteenths of the dense weight, and
writes its result transposed, as needed here. CUTLASS' kernels support compute capability 8.x only,
and their result is transposed by a copy.

Shapes: S slices and A active entries of a slice, n = S A; W (out, in) is the dense weight of this
rank; N tokens. A library multiplies with (rows, columns), which is W or its transpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from megatron_spdf.kernels.dispatch import DENSE, warn_once
from megatron_spdf.kernels.mask import Mask, positions
from megatron_spdf.text import first_line

DTYPES = (torch.bfloat16, torch.float16)  # sparse tensor cores want 1:2, not 2:4, for TF32
# cuSPARSELt's fastest algorithm for products whose three sizes are at least LARGE, and the version
# of the library that numbers it so.
FASTEST, FASTEST_OF, LARGE = 17, 800, 2048
SIDE, TOKENS = 64, 8  # both axes of a weight are multiples of SIDE, and N of TOKENS


@dataclass(frozen=True)
class TwoFourTable:
    """Tables of a 2:4 mask for a library of sparse tensor cores.

    Attributes:
        metadata, transposed: places of the active entries of W, and of its transpose, in the
            library's own format.
        order: (n,) int32, index among the values of each active entry of the transpose, row by row.
    """

    metadata: Tensor
    transposed: Tensor
    order: Tensor


class Library(Protocol):
    """Library of products with a 2:4 weight W (rows, columns)."""

    NAME: str

    def metadata(self, pattern: Tensor, dtype: torch.dtype) -> Tensor:
        """Metadata of a mask, integers.

        Args:
            pattern: (rows, columns) bool, active entries.
            dtype: of the values.
        """

    def multiply(self, values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        """Product x W^T, (N, rows), contiguous.

        Args:
            values: (rows, columns / 2), active values of each row.
            metadata: result of `metadata`.
            x: (N, columns).
        """


class CuSparseLt:
    """cuSPARSELt with the compact values, which come first in its array of values and metadata."""

    NAME = "cuSPARSELt"

    def metadata(self, pattern: Tensor, dtype: torch.dtype) -> Tensor:
        """Second part of the array that the library makes of a weight of ones."""
        ones = pattern.to(dtype).contiguous()
        return torch._cslt_compress(ones).flatten().view(torch.int16)[ones.numel() // 2 :].clone()

    def multiply(self, values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        """Product with values and metadata joined to one array."""
        packed = torch.cat([values.reshape(-1), metadata.view(values.dtype)])
        # The library reads the number of rows from the shape, and ignores that of columns.
        packed = packed.view(len(values), -1)
        return torch._cslt_sparse_mm(packed, x.contiguous().T, transpose_result=True,
                                     alg_id=algorithm(*values.shape, len(x), values.dtype))


@cache
def algorithm(rows: int, half: int, tokens: int, dtype: torch.dtype) -> int:
    """Number of cuSPARSELt's algorithm for a product, by sizes alone.

    The library's own choice, 0, took 1.33 times the time of the dense product for the weights of
    GPT-3 XL, forward and back, at 16,384 tokens on an H100 (2026-11-27, cuSPARSELt 0.8.0), and 17,
    the fastest of 21, 0.73 times. No trial at a run's start, which would change a resumed run.

    Args:
        rows, half: shape of the active values of each row.
        tokens: N.
        dtype: of the values.
    """
    measured = (torch.backends.cusparselt.version() == FASTEST_OF and dtype == torch.bfloat16
                and torch.cuda.get_device_capability()[0] == 9)
    return FASTEST if measured and min(rows, 2 * half, tokens) >= LARGE else 0


class Cutlass:
    """CUTLASS' kernels, on compute capability 8.x."""

    NAME = "CUTLASS"

    def metadata(self, pattern: Tensor, dtype: torch.dtype) -> Tensor:
        """Metadata in PyTorch's conversion for CUTLASS."""
        return sparse_semi_structured_from_dense_cutlass(pattern.to(dtype).contiguous())[1]

    def multiply(self, values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        """Product of W and x^T, transposed by a copy."""
        return torch._sparse_semi_structured_mm(values.contiguous(), metadata,
                                                x.contiguous().T).T.contiguous()


class CompressedEachTime:
    """cuSPARSELt with the expanded weight, compressed for every product.

    The library does not document where its array holds the values. If they are not first, the array
    cannot be built from them.
    """

    NAME = "cuSPARSELt, compressed anew for each product"

    def metadata(self, pattern: Tensor, dtype: torch.dtype) -> Tensor:
        """The pattern itself, which places the values."""
        return pattern.contiguous()

    def multiply(self, values: Tensor, metadata: Tensor, x: Tensor) -> Tensor:
        """Product with the weight expanded and compressed."""
        weight = values.new_zeros(metadata.shape).masked_scatter_(metadata, values)
        return torch._cslt_sparse_mm(torch._cslt_compress(weight), x.contiguous().T,
                                     transpose_result=True)


# In the order of preference.
LIBRARIES: tuple[Library, ...] = (CuSparseLt(), Cutlass(), CompressedEachTime())


def fits(shape: tuple[int, int]) -> bool:
    """True if the libraries support a weight of this shape, and its transpose."""
    return not any(n % SIDE for n in shape)


def find_two_four(
    bits: Tensor, slice_shape: tuple[int, int], axis: int, library: Library, dtype: torch.dtype
) -> TwoFourTable:
    """Tables of a 2:4 mask for a library, on the device of its bits.

    Args:
        bits: (S, ceil(entries per slice / 8)) uint8.
        slice_shape: (out, in) of a slice.
        axis: along which the slices lie beside one another.
        library: that will multiply.
        dtype: of the values.
    """
    places = positions(bits, slice_shape, axis)
    rows, columns = (n * (len(bits) if i == axis else 1) for i, n in enumerate(slice_shape))
    pattern = torch.zeros(rows * columns, dtype=torch.bool, device=bits.device)
    pattern[places] = True
    pattern = pattern.view(rows, columns)
    # Sorted by position in the transpose: by column of W first, then by row.
    order = (places % columns * rows + places // columns).argsort()
    return TwoFourTable(library.metadata(pattern, dtype), library.metadata(pattern.T, dtype),
                        order.int())


def packed(values: Tensor, mask: Mask) -> Tensor:
    """Active values of each row of W, (out, in / 2).

    They are the values as they are, or with slices side by side if these cut columns.
    """
    rows, columns = mask.shape
    if mask.axis == 0:
        return values.reshape(rows, columns // 2)
    return values.reshape(mask.slices, rows, -1).transpose(0, 1).reshape(rows, columns // 2)


def packed_transposed(values: Tensor, mask: Mask) -> Tensor:
    """Active values of each column of W, (in, out / 2)."""
    rows, columns = mask.shape
    return values.reshape(-1).index_select(0, mask.tables.order).view(columns, rows // 2)


def _self_test(library: Library, device: torch.device, dtype: torch.dtype) -> None:
    """Raises if a library disagrees with a dense product.

    Operands are small whole numbers, so that both are exact in any order of the sums.
    """
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
    """Library that multiplies with 2:4 weights on sparse tensor cores, and its name for the log.

    Args:
        device: cpu or cuda.
        dtype: of the values.

    Returns:
        (library, name); without a library (None, reason).
    """
    if device != "cuda":
        return None, DENSE
    if dtype not in DTYPES:
        return None, f"{DENSE}, since sparse tensor cores are for 16 bits here, not {dtype}"
    failures = []
    for library in LIBRARIES:
        try:
            _self_test(library, torch.device(device), dtype)
            return library, library.NAME
        # A library, a driver or a new GPU may raise anything.
        except Exception as error:
            failures.append(f"{library.NAME} does not work here ({type(error).__name__}: "
                            f"{first_line(error)})")
    return None, f"{DENSE}, since {' and '.join(failures)}"


def two_four_library(dense: Tensor) -> Library | None:
    """Library that multiplies with the 2:4 weight of a dense one's shape. None if it is
    expanded."""
    library, _ = two_four_products(dense.device.type, dense.dtype)
    if library is None or fits(dense.shape):
        return library
    warn_once(f"a 2:4 weight {dense.shape[0]} x {dense.shape[1]} is {DENSE}: {library.NAME} is "
              f"asked for multiples of {SIDE} along both axes only")
    return None
