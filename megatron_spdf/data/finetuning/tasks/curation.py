"""Curation Corpus (Curation, 2020): CSV with columns title, article_content and summary; article to
summary.

The articles are not published with it: its users scrape them.
"""

from __future__ import annotations

from pathlib import Path

from megatron_spdf.data.finetuning.files import csv_rows, text_of
from megatron_spdf.data.finetuning.task import TASKS, Example, Task


def read(path: Path) -> list[Example]:
    """One example per row; the title takes no part in it."""
    return [Example(text_of(where, row, "article_content"), (text_of(where, row, "summary"),))
            for where, row in csv_rows(path, ("title", "article_content", "summary"))]


TASKS.register("curation", Task(
    title="Curation Corpus (Curation, 2020)",
    files={"train": ("train.csv",), "validation": ("validation.csv", "valid.csv", "dev.csv"),
           "test": ("test.csv",)},
    read=read, metrics=("rouge",)))
