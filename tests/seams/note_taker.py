"""A log writer of our own in one file: figures as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from megatron_spdf.recipe.recipe import LOG_WRITERS
from megatron_spdf.runs.writers.base import Writer


class NoteTaker(Writer):
    """Appends a line for each record to a file of the run directory."""

    name: ClassVar = "notes"
    type: ClassVar = str | None
    field: ClassVar = Field(None, description="file of notes, in the run directory")
    title: ClassVar = "notes"

    @classmethod
    def check(cls, value: str) -> None:
        if "/" in value:
            raise ValueError(f"log.notes={value} is no plain name; take one without a slash")

    def __init__(self, value: str, run, step: int):
        self._file = (run.root / value).open("a")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._file.write(f"{step}: {' '.join(sorted(figures))}\n")

    def close(self) -> None:
        self._file.close()


LOG_WRITERS.register(NoteTaker.name, NoteTaker)
