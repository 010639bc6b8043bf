"""Cases of weights of tiles, on kernels as a GPU takes them: Triton's, in its interpreter."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import cases

from megatron_spdf.kernels import dispatch, tiles
from megatron_spdf.layers.compact import compact_of, sparse_modules


@contextmanager
def triton_on_cpu():
    """Lets the CPU take what a GPU takes."""
    from megatron_spdf.kernels import triton_compact

    tiles.tile_products.cache_clear()
    with patch.object(dispatch, "backend_for",
                      lambda device: (triton_compact, triton_compact.NAME)):
        yield
    tiles.tile_products.cache_clear()


def with_triton(recipe: dict, steps: int) -> dict:
    """`cases.train`, with what its layers multiplied by and the description for the log."""
    with triton_on_cpu(), cases.bench(recipe) as b:
        curve = b.steps(0, steps)
        modules = [m for model in b.engine.models for m in sparse_modules(model)]
        return {"curve": curve, "choices": b.engine.choices, "masks": cases.masks(b.engine),
                "products": {type(compact_of(m).product).__name__ for m in modules},
                "sparsity": b.engine.measured_sparsity(), "held": b.engine.state_bytes(),
                "values": [m.parametrizations.weight.original.shape for m in modules]}


def with_triton_cut(recipes: list[dict], stops: list[int]) -> list[tuple[float, float]]:
    with triton_on_cpu():
        return cases.cut(recipes, stops)


def with_triton_densified(recipe: dict, steps: int) -> dict:
    with triton_on_cpu():
        return cases.densified(recipe, steps)


def with_triton_against_plain(recipe: dict, steps: int) -> dict:
    with triton_on_cpu():
        return cases.against_plain(recipe, steps)
