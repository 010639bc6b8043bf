"""Fine-tuning tasks: an input, linearized to text, and the texts that may follow it.

    examples = load_examples("e2e", Path("e2e"), "train")
    pairs = training_pairs(examples)  # (context, reference)

A record of the data is an example. E2E, whose records have one reference each, is grouped by
meaning representation, as its official evaluation does.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_spdf.data.finetuning.tasks import curation, dart, e2e, jsonl, scitldr, webnlg
from megatron_spdf.data.finetuning.tasks.example import SPLITS, Example
from megatron_spdf.data.finetuning.tasks.files import find_file

__all__ = ["SPLITS", "TASKS", "Example", "load_examples", "training_pairs"]

_FORMATS = {"e2e": e2e, "webnlg": webnlg, "dart": dart, "curation": curation, "scitldr": scitldr,
            "jsonl": jsonl}
TASKS = tuple(_FORMATS)


def load_examples(task: str, path: Path, split: str) -> list[Example]:
    """The examples of a split, in the order of the data.

    Args:
        task: one of TASKS.
        path: the split's file, or the directory that holds the splits under the names they are
            published with.
        split: "train", "validation" or "test". In train and validation every example has a
            reference; in test it may have none.

    Raises:
        ValueError: the task or split is unknown, a field is missing or malformed (with its file and
            its line or record), or the split is empty.
        FileNotFoundError: nothing is at `path`, or the directory has no file of this split.
    """
    if task not in _FORMATS:
        raise ValueError(f"task {task!r} is unknown; choose one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    form = _FORMATS[task]
    file = find_file(Path(path), form.FILES[split], task, split)
    examples = form.read(file)
    if split != "test":
        examples = [example for example in examples if example.references]
    if not examples:
        raise ValueError(f"{file} has no "
                         f"{'example' if split == 'test' else 'example with a reference'}; the "
                         f"{split} split of {task} must not be empty")
    return examples


def training_pairs(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Every (context, reference)."""
    return [(example.context, reference) for example in examples
            for reference in example.references]
