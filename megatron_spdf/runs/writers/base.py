"""What a writer is: its key in the recipe, and where it takes the figures of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.fields import FieldInfo

from megatron_spdf.recipe.recipe import LOG_WRITERS, Log

if TYPE_CHECKING:  # imports PyTorch, and a recipe is read without
    from megatron_spdf.runs.run_dir import RunDir


class Writer(ABC):
    """Takes the figures of a run to a place beside log.jsonl, on the rank that writes the log.

    It is made when the log is opened. Whatever its methods raise, the run goes on: the log says it
    once, closes the writer, and makes a new one at a record a minute later, or more where that
    took long. Waits of over half a minute would be taken for a rank that hangs.

    Attributes:
        name: key of `log` in the recipe.
        type, field: of that key's value; a false value: off.
        title: for messages.

    Args:
        value: of the key.
        run: directory of the run, into which it writes.
        step: the last one that counts; what was written of later ones, before a crash, does not.
    """

    name: ClassVar[str]
    type: ClassVar[Any]
    field: ClassVar[FieldInfo]
    title: ClassVar[str]

    @classmethod  # noqa: B027
    def check(cls, value: Any) -> None:
        """Checks before the run starts that this machine has what the writer needs; here nothing.

        Raises:
            ValueError: it has not, with the remedy.
        """

    @abstractmethod
    def __init__(self, value: Any, run: RunDir, step: int):
        ...

    @abstractmethod
    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes figures by name, `kind/figure`, at a step."""

    @abstractmethod
    def close(self) -> None:
        """Brings what is not written yet to its place."""


def chosen(log: Log) -> Iterator[tuple[type[Writer], Any]]:
    """The writers that a recipe turns on, with the values of their keys."""
    for name in LOG_WRITERS.names():
        if value := getattr(log, name):
            yield LOG_WRITERS.get(name), value


def check_writers(log: Log) -> None:
    """Checks all writers of a recipe.

    Raises:
        ValueError: see `Writer.check`.
    """
    for writer, value in chosen(log):
        writer.check(value)
