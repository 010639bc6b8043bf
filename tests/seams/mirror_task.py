"""A task of our own in one file: words to their mirror images, "stone > enots", one pair a line.

Scored without regard to case by BLEU and by the share of exact matches, a metric of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_spdf.data.finetuning.task import TASKS, Example, OfficialForm, Task
from megatron_spdf.evaluation.metrics.metric import METRICS, Figure, Figures, Metric, by_part


def read(path: Path) -> list[Example]:
    """One example per line; words of up to three letters are a part of the test set."""
    examples = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        word, arrow, mirrored = line.partition(" > ")
        if not arrow:
            raise ValueError(f"{path}, line {number}: {line!r} is not of the form word > mirrored")
        examples.append(Example(word, (mirrored,), "short" if len(word) < 4 else "long"))
    return examples


@by_part
def exact(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Figures:
    """Share of outputs that equal a reference."""
    right = [text in texts for text, texts in zip(outputs, references, strict=True)]
    return {"exact": Figure(sum(right) / len(right), "own")}


METRICS.register("exact", Metric(("exact",), exact))
TASKS.register("mirror", Task(
    title="words to their mirror images",
    files={"train": ("train.pairs",), "validation": ("valid.pairs",), "test": ("test.pairs",)},
    read=read, metrics=("exact", "bleu_13a"),
    form=OfficialForm(str.lower, str.lower, most=1)))
