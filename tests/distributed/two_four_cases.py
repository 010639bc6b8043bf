"""Cases of 2:4 weights, on a library for sparse tensor cores as a GPU has it: a stand-in on the
CPU."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import cases

from megatron_spdf.kernels import two_four
from megatron_spdf.layers.compact import compact_of, sparse_modules

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from stand_in_library import StandIn  # noqa: E402


@contextmanager
def sparse_tensor_cores():
    """Lets the CPU take what a GPU takes; gives the library, which counts its products."""
    library = StandIn()
    with patch.object(two_four, "two_four_products", lambda device, dtype: (library, library.NAME)):
        yield library


def with_library(recipe: dict, steps: int) -> dict:
    """`cases.train`, with what its layers multiplied by and the description for the log."""
    with sparse_tensor_cores() as library, cases.bench(recipe) as b:
        curve = b.steps(0, steps)
        modules = [m for model in b.engine.models for m in sparse_modules(model)]
        return {"curve": curve, "choices": b.engine.choices, "masks": cases.masks(b.engine),
                "kinds": {type(compact_of(m).product).__name__ for m in modules},
                "products": library.products,
                "sparsity": b.engine.measured_sparsity(), "held": b.engine.state_bytes()}


def with_library_cut(recipes: list[dict], stops: list[int]) -> list[tuple[float, float]]:
    with sparse_tensor_cores():
        return cases.cut(recipes, stops)
