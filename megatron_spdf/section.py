"""The base of a recipe's sections, and the forms that their values may be written in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from megatron_spdf.paths import expand_home
from megatron_spdf.registry import Registry

MULTIPLES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(value: Any) -> Any:
    """`26B`, `375M`, `2.5e9` or 5_000 -> int; what cannot be read is passed on for pydantic to
    refuse."""
    if isinstance(value, str) and value:
        text, factor = value.replace("_", "").strip().lower(), 1
        if text[-1:] in MULTIPLES:
            text, factor = text[:-1], MULTIPLES[text[-1]]
        try:
            value = float(text) * factor
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float | date) else value


# Bounds that nothing meets: beyond them counts hang tools that enumerate, or overflow.
MOST_LAYERS, MOST_WIDTH, MOST_IDS, MOST_POSITIONS = 2**11, 2**20, 2**26, 2**26
MOST_RANKS, MOST_SEQUENCES, MOST_STEPS, MOST_TOKENS = 2**20, 2**24, 10**12, 10**18
MOST_SECONDS, MOST_WEIGHTS = 10**9, 10**15
# Of numbers with a fraction: computations in fp32 overflow from 3e38 on, and vanish under 1e-38.
LARGEST_NUMBER, SMALLEST_NUMBER = 1e30, 1e-30
# PyTorch takes 64 bits, of which a sign is one.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, BeforeValidator(parse_count)]


# `~` is the home directory, as in a shell
PathText = Annotated[str, AfterValidator(expand_home)]
Paths = Annotated[list[PathText], BeforeValidator(as_list)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True,
                              allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python and pydantic take true for 1."""
        for truth in _truths_for_numbers(value, cls.model_fields[info.field_name].annotation):
            raise PydanticCustomError("number", "input should be a number, and {value} is none",
                                      {"value": str(truth).lower()})
        return value

    @field_validator("*")
    @classmethod
    def _fits_in_fp32(cls, value: Any) -> Any:
        if isinstance(value, float) and value and not (
                SMALLEST_NUMBER <= abs(value) <= LARGEST_NUMBER):
            raise PydanticCustomError("number", "input should be 0, or from {least} to {most} or "
                                      "minus that, as computations have 32 bits",
                                      {"least": f"{SMALLEST_NUMBER:g}",
                                       "most": f"{LARGEST_NUMBER:g}"})
        return value

    @classmethod
    def all_fields(cls) -> dict[str, FieldInfo]:
        """Returns the fields by key, those too that only some values of another key bring."""
        return dict(cls.model_fields)


def _truths_for_numbers(value: Any, annotation: Any) -> Iterator[bool]:
    """Truth values in a value, and in the lists and mappings in it, where numbers should be."""
    if isinstance(value, bool) and _is_number(annotation):
        yield value
    for kind in _kinds(annotation) if isinstance(value, list | dict) else ():
        if get_origin(kind) is type(value):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from _truths_for_numbers(inner, get_args(kind)[-1])


def _is_number(annotation: Any) -> bool:
    """True if it takes numbers, and no truth values."""
    kinds = set(_kinds(annotation))
    return bool(kinds & {int, float}) and bool not in kinds


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types of which an annotation takes one."""
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        inner = inner[:1]
    elif get_origin(annotation) not in (Union, UnionType):
        inner = ()
    if not inner:
        yield annotation
    for each in inner:
        yield from _kinds(each)


def _known(registry: Registry, name: Any) -> Any:
    """The tenant of a name; an error of pydantic's where there is none."""
    try:
        return registry.get(name)
    except ValueError as error:
        raise PydanticCustomError("name", "{said}", {"said": str(error)}) from None


@dataclass(frozen=True)
class OneOf:
    """Annotation of a text that names a tenant of a seam."""

    registry: Registry

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        _known(self.registry, name)
        return name


class SectionOf(ABC):
    """Annotation of a field whose section's class depends on the tenants of a seam.

    Attributes:
        key: of the section, whose value chooses among several classes; empty: there is one.
    """

    key: str = ""

    @abstractmethod
    def section(self, values: Any) -> type[Section]:
        """The class for these values.

        Raises:
            ValueError: they name no tenant.
        """

    @abstractmethod
    def sections(self) -> dict[str, type[Section]]:
        """All classes by the name that chooses them, the default's first."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        # "any": dumped with all fields of the class that was chosen
        return core_schema.no_info_before_validator_function(
            self._read, handler(source), serialization=core_schema.simple_ser_schema("any"))

    def _read(self, values: Any) -> Any:
        if not isinstance(values, dict):
            return values  # a section already, or for pydantic to refuse
        try:
            section = self.section(values)
        except ValueError as error:
            wrong = PydanticCustomError("name", "{said}", {"said": str(error)})
            raise ValidationError.from_exception_data("name", [
                InitErrorDetails(type=wrong, loc=(self.key,), input=values[self.key])]) from None
        return section.model_validate(values)


@dataclass(frozen=True)
class ByName(SectionOf):
    """Annotation of a field whose section is that of the tenant it names:
    `optimizer: {name: adamw, ...}` is read as the section of the optimizer adamw.

    Args:
        registry: of the seam.
        default: name of the tenant where the section gives none.
        section_of: tenant -> the class of its section.
        key: of the section, whose value is the name.
    """

    registry: Registry
    default: str
    section_of: Callable[[Any], type[Section]]
    key: str = "name"

    def section(self, values: Any) -> type[Section]:
        """See the base."""
        name = values.get(self.key, self.default) if isinstance(values, dict) else self.default
        return self.section_of(self.registry.get(str(name)))

    def sections(self) -> dict[str, type[Section]]:
        """See the base."""
        names = sorted(self.registry.names(), key=lambda name: name != self.default)
        return {name: self.section_of(self.registry.get(name)) for name in names}

    def _read(self, values: Any) -> Any:
        return super()._read({self.key: self.default, **values} if isinstance(values, dict)
                             else values)


@dataclass(frozen=True)
class WithTenants(SectionOf):
    """Annotation of a field to whose section every tenant of a seam adds the key of its name.

    Args:
        registry: of the seam.
        base: the section without those keys.
        field_of: tenant -> type and field of its key.
    """

    registry: Registry
    base: type[Section]
    field_of: Callable[[Any], tuple[Any, FieldInfo]]

    def section(self, values: Any = None) -> type[Section]:
        """The one class there is, with the keys of all tenants."""
        return _extended(self)

    def sections(self) -> dict[str, type[Section]]:
        """See the base."""
        return {"": self.section()}


@cache
def _extended(mark: WithTenants) -> type[Section]:
    """The class of a mark; made when it is first asked for, as plugins may bring tenants."""
    fields = {name: mark.field_of(mark.registry.get(name)) for name in mark.registry.names()}
    return create_model(mark.base.__name__, __base__=mark.base, __doc__=mark.base.__doc__, **fields)
