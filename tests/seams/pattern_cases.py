"""What runs on the ranks of test_pattern.py, which know the pattern of diagonal_pattern.py."""

from __future__ import annotations

import cases
import diagonal_pattern  # noqa: F401
from cases import against_plain, cut

from megatron_spdf.layers.compact import compact_of, sparse_modules

__all__ = ["against_plain", "cut", "trained"]


def trained(recipe: dict, steps: int) -> dict:
    """`cases.train`, with what its layers multiply by and the line for the log."""
    with cases.bench(recipe) as b:
        modules = [m for model in b.engine.models for m in sparse_modules(model)]
        return {"curve": b.steps(0, steps), "masks": cases.masks(b.engine),
                "sparsity": b.engine.measured_sparsity(), "held": b.engine.state_bytes(),
                "predicted": cases.predicted_bytes(b), "choices": b.engine.choices,
                "products": {type(compact_of(m).product).__name__ for m in modules}}
