"""The section of a recipe that says what is sparse."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from megatron_spdf.section import OneOf, Section, Seed
from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, MaskAlgorithm
from megatron_spdf.sparsity.patterns.base import PATTERNS, Pattern

Level = Annotated[float, Field(ge=0.0, lt=1.0)]


class SparsityRule(Section):
    """The sparsity of the weights whose canonical name matches a glob."""

    weights: str = Field(description="glob on the canonical name, e.g. `*.mlp.*` or "
                                     "`decoder.layers.0.*`")
    level: Level = Field(description="fraction of zeros, in [0, 1)")


class Sparsity(Section):
    """Random masks, static or moved while training. Also written as a number, or as a list of rules
    with all other weights dense."""

    model_config = ConfigDict(extra="allow")  # the pattern's keys, which the pattern validates

    level: Level = Field(
        0.0, description="fraction of zeros of every linear weight that no rule matches"
    )
    pattern: Annotated[str, OneOf(PATTERNS)] = Field(
        "unstructured",
        description="what is active or zero: single weights, square tiles of them, two of every "
                    "four both ways, ...")
    distribution: Literal["uniform", "erk"] = Field(
        "uniform", description="of the zeros over weights that no rule matches: the same level, or "
                               "by Erdos-Renyi kernel, denser where a weight is smaller; with as "
                               "many active in all")
    dense_copy: Literal["per_step", "per_layer"] = Field(
        "per_step", description="dense copies of sparse weights: kept for the step, or made again "
                                "in forward and backward")
    rules: list[SparsityRule] = Field([], description="the first rule that matches a weight wins")
    seed: Seed = Field(0,
                      description="of the masks; they depend on it and the weight's name alone")
    algorithm: Annotated[str, OneOf(ALGORITHMS)] = Field(
        "static", description="how masks move while training")
    update: SerializeAsAny[MaskAlgorithm] = Field(
        default_factory=dict, validate_default=True, description="the keys of the algorithm")
    reached: float = Field(
        1.0, ge=0.0, le=1.0, description="share of the levels that this part of a run stores its "
                                         "weights at; set by the run where the algorithm prunes")

    @field_validator("update", mode="before")
    @classmethod
    def _keys_of_the_algorithm(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads the section as that of the algorithm, which refuses the keys of others."""
        if not isinstance(value, dict | None):
            return value  # a section already, or for pydantic to refuse
        if "algorithm" not in info.data:  # it is refused, and nobody knows whose keys these are
            return ALGORITHMS.get("static")()
        algorithm, given = ALGORITHMS.get(info.data["algorithm"]), value or {}
        if unknown := [key for key in given if key not in algorithm.model_fields]:
            raise ValidationError.from_exception_data("update", [
                InitErrorDetails(loc=(key,), input=given[key],
                                 type=PydanticCustomError("unknown_key", "{said}", {
                                     "said": _unknown_key(key, algorithm)})) for key in unknown])
        return algorithm.model_validate(given)

    def held(self) -> Sparsity:
        """The same masks, which stay."""
        if self.update.stays:
            return self
        return Sparsity.model_validate({**self.model_dump(exclude={"update"}),
                                        "algorithm": "static"})

    @model_validator(mode="wrap")
    @classmethod
    def _with_keys_of_the_pattern(cls, value: Any,
                                  validate: ModelWrapValidatorHandler[Sparsity]) -> Sparsity:
        """Holds the keys beside the section's own to the pattern.

        Those of other patterns wait for a word that changes the pattern.
        """
        section = validate(normalize_sparsity(value))
        given = dict(section.model_extra or {})
        wanted = PATTERNS.get(section.pattern)
        own = {key: given.pop(key) for key in wanted.model_fields if key in given}
        pattern = wanted.model_validate(own)
        if unknown := [key for key in given if key not in cls.all_fields()]:
            raise ValidationError.from_exception_data(cls.__name__, [
                InitErrorDetails(type="extra_forbidden", loc=(key,), input=given[key])
                for key in unknown])
        section.__pydantic_extra__.clear()
        section.__pydantic_extra__.update(pattern.model_dump())
        return section

    @classmethod
    def all_fields(cls) -> dict[str, FieldInfo]:
        fields = super().all_fields()
        for name in PATTERNS.names():
            fields |= PATTERNS.get(name).model_fields
        return fields

    @property
    def masks(self) -> Pattern:
        """The pattern with the values of its keys."""
        return PATTERNS.get(self.pattern).model_validate(self.model_extra)


def _unknown_key(key: str, algorithm: type[MaskAlgorithm]) -> str:
    known = list(algorithm.model_fields)
    near = difflib.get_close_matches(key, known, n=len(known) or 1, cutoff=0.0)
    return (f"the mask algorithm {algorithm.name} has no such key; known: "
            f"{', '.join(near) or 'none'}. Leave it out, or set sparsity.update=null to be rid of "
            "those of another algorithm")


def normalize_sparsity(value: Any) -> Any:
    """The short forms of `sparsity:` as the mapping they stand for."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        dense = {"algorithm": "static", "update": None} if value == 0 else {}
        return {"level": value, "rules": [], **dense}
    if isinstance(value, list):
        return {"level": 0.0, "rules": value}
    return value
