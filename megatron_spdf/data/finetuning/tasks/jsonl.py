"""A task of your own: JSON lines of {"context": text, "completion": text, or a list of texts that
are all right}."""

from __future__ import annotations

from pathlib import Path

from megatron_spdf.data.finetuning.files import json_lines, text_of, texts_of
from megatron_spdf.data.finetuning.task import TASKS, Example, Task


def read(path: Path) -> list[Example]:
    """One example per line; without "completion" it has no reference."""
    examples = []
    for where, record in json_lines(path):
        if "completion" not in record:
            references: tuple[str, ...] = ()
        elif isinstance(record["completion"], list):
            references = texts_of(where, record, "completion")
        else:
            references = (text_of(where, record, "completion"),)
        examples.append(Example(text_of(where, record, "context"), references))
    return examples


TASKS.register("jsonl", Task(
    title='your own: lines of {"context", "completion"}',
    files={"train": ("train.jsonl", "train.ndjson"),
           "validation": ("validation.jsonl", "valid.jsonl", "dev.jsonl",
                          "validation.ndjson", "valid.ndjson", "dev.ndjson"),
           "test": ("test.jsonl", "test.ndjson")},
    read=read, metrics=("bleu_13a", "rouge")))
