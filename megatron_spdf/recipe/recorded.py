"""Recipes as runs have recorded them, in words of today."""

from __future__ import annotations

from typing import Any


def as_recorded(values: Any) -> Any:
    """Values of a recipe that a run has recorded, every default of its time filled in.

    Under `parametrization: mup` Q K^T was multiplied by 1 / d, whatever the base model, before
    there was a key for the width of the base model's heads. That is sqrt(d_base) / d with d_base 1.
    """
    if not isinstance(values, dict) or values.get("parametrization") != "mup":
        return values
    base = values.get("mup_base")
    return {**values, "mup_base": {"head_width": 1, **base}} if isinstance(base, dict) else values
