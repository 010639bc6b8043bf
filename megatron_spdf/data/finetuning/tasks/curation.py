"""Curation Corpus (Curation, 2020): CSV with columns title, article_content and summary; article to
summary.

The articles are not published with it: its users scrape them.
"""

from __future__ import annotations

from pathlib import Path

from megatron_spdf.data.finetuning.tasks.example import Example
from megatron_spdf.data.finetuning.tasks.files import csv_rows, text_of

FILES = {"train": ("train.csv",), "validation": ("validation.csv", "valid.csv", "dev.csv"),
         "test": ("test.csv",)}


def read(path: Path) -> list[Example]:
    """One example per row; the title takes no part in it."""
    return [Example(text_of(where, row, "article_content"), (text_of(where, row, "summary"),))
            for where, row in csv_rows(path, ("title", "article_content", "summary"))]
