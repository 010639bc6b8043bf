"""SciTLDR-A (Cachola et al., 2020): JSON lines, the sentences of an abstract to one of its short
summaries."""

from __future__ import annotations

from pathlib import Path

from megatron_spdf.data.finetuning.files import json_lines, texts_of
from megatron_spdf.data.finetuning.task import TASKS, Example, Task


def read(path: Path) -> list[Example]:
    """One example per record, its sentences joined by blanks."""
    return [Example(" ".join(texts_of(where, record, "source")), texts_of(where, record, "target"))
            for where, record in json_lines(path)]


TASKS.register("scitldr", Task(
    title="SciTLDR-A (Cachola et al., 2020)",
    files={"train": ("train.jsonl",), "validation": ("dev.jsonl", "validation.jsonl"),
           "test": ("test.jsonl",)},
    read=read, metrics=("rouge",)))
