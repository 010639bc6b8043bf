"""Any case with the products of a GPU, on the CPU: Triton's kernels in its interpreter, and a
stand-in for the library of sparse tensor cores."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from megatron_spdf.kernels import dispatch, tiles, two_four

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from stand_in_library import StandIn  # noqa: E402


def with_triton(case: Callable, *arguments):
    """What a case gives on the kernels that a GPU takes."""
    from megatron_spdf.kernels import triton_compact

    tiles.tile_products.cache_clear()
    with patch.object(dispatch, "backend_for",
                      lambda device: (triton_compact, triton_compact.NAME)):
        found = case(*arguments)
    tiles.tile_products.cache_clear()
    return found


def with_library(case: Callable, *arguments):
    """What a case gives on the library, and how many products that makes."""
    library = StandIn()
    with patch.object(two_four, "two_four_products", lambda device, dtype: (library, library.NAME)):
        return case(*arguments), library.products
