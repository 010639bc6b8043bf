"""The section of a recipe that says what is sparse."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from megatron_spdf.section import Section
from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, MaskAlgorithm

Level = Annotated[float, Field(ge=0.0, lt=1.0)]


class SparsityRule(Section):
    """The sparsity of the weights whose canonical name matches a glob."""

    weights: str = Field(description="glob on the canonical name, e.g. `*.mlp.*` or "
                                     "`decoder.layers.0.*`")
    level: Level = Field(description="fraction of zeros, in [0, 1)")


class Sparsity(Section):
    """Random masks, static or moved while training. Also written as a number, or as a list of rules
    with all other weights dense."""

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
    algorithm: str = Field("static", description="how masks move while training")
    update: SerializeAsAny[MaskAlgorithm] = Field(
        default_factory=dict, validate_default=True, description="the keys of the algorithm")

    @field_validator("algorithm")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            ALGORITHMS.get(name)
        except ValueError as error:
            raise PydanticCustomError("unknown_name", "{said}", {"said": str(error)}) from None
        return name

    @field_validator("update", mode="before")
    @classmethod
    def _keys_of_the_algorithm(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads the section as that of the algorithm, which refuses the keys of others."""
        if not isinstance(value, dict | None) or "algorithm" not in info.data:
            return value  # a section already, or for pydantic to refuse
        algorithm, given = ALGORITHMS.get(info.data["algorithm"]), value or {}
        if unknown := [key for key in given if key not in algorithm.model_fields]:
            raise ValidationError.from_exception_data("update", [
                InitErrorDetails(loc=(key,), input=given[key],
                                 type=PydanticCustomError("unknown_key", "{said}", {
                                     "said": _unknown_key(key, algorithm)})) for key in unknown])
        return algorithm.model_validate(given)

    def held(self) -> Sparsity:
        """The same masks, which stay."""
        return Sparsity.model_validate({**self.model_dump(exclude={"update"}),
                                        "algorithm": "static"})

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        return normalize_sparsity(value)


def _unknown_key(key: str, algorithm: type[MaskAlgorithm]) -> str:
    known = list(algorithm.model_fields)
    near = difflib.get_close_matches(key, known, n=len(known) or 1, cutoff=0.0)
    return (f"the mask algorithm {algorithm.name} has no such key; known: "
            f"{', '.join(near) or 'none'}. Leave it out, or set sparsity.update=null to be rid of "
            "those of another algorithm")


def normalize_sparsity(value: Any) -> Any:
    """The short forms of `sparsity:` as the mapping they stand for."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return {"level": value, "rules": []}
    if isinstance(value, list):
        return {"level": 0.0, "rules": value}
    if isinstance(value, dict) and value.get("pattern") == 124:
        return {**value, "pattern": "2:4"}  # which YAML 1.1 reads as a number to base 60
    return value
