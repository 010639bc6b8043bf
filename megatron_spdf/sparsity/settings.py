"""The section of a recipe that says what is sparse."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_spdf.section import Section

Level = Annotated[float, Field(ge=0.0, lt=1.0)]


class SparsityRule(Section):
    """The sparsity of the weights whose canonical name matches a glob."""

    weights: str = Field(description="glob on the canonical name, e.g. `*.mlp.*` or "
                                     "`decoder.layers.0.*`")
    level: Level = Field(description="fraction of zeros, in [0, 1)")


class Sparsity(Section):
    """Static random masks. Also written as a number, or as a list of rules with all other weights
    dense."""

    level: Level = Field(
        0.0, description="fraction of zeros of every linear weight that no rule matches"
    )
    pattern: Literal["unstructured", "tile", "2:4"] = Field(
        "unstructured",
        description="what is active or zero: single weights, square tiles of them, or two of every "
                    "four both ways")
    tile: int = Field(
        64, gt=0, description="side of a tile; levels are rounded to equally many tiles in every "
                              "row and column")
    dense_copy: Literal["per_step", "per_layer"] = Field(
        "per_step", description="dense copies of sparse weights: kept for the step, or made again "
                                "in forward and backward")
    rules: list[SparsityRule] = Field([], description="the first rule that matches a weight wins")
    seed: int = Field(0, ge=0,
                      description="of the masks; they depend on it and the weight's name alone")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        return normalize_sparsity(value)


def normalize_sparsity(value: Any) -> Any:
    """The short forms of `sparsity:` as the mapping they stand for."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return {"level": value, "rules": []}
    if isinstance(value, list):
        return {"level": 0.0, "rules": value}
    if isinstance(value, dict) and value.get("pattern") == 124:
        return {**value, "pattern": "2:4"}  # which YAML 1.1 reads as a number to base 60
    return value
