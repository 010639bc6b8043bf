"""Fine-tuning tasks: how their data are read, and how what a model writes for them is scored.

    examples = load_examples("e2e", Path("data/e2e"), "train")
    pairs = training_pairs(examples)  # (context, reference)

A task is one file of the room `tasks` that registers itself in TASKS; docs/extending.md has an
example.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_spdf.data.finetuning.files import find_file
from megatron_spdf.paths import same_file
from megatron_spdf.registry import Registry

SPLITS = ("train", "validation", "test")
Loses = Literal["beginning", "end"]


@dataclass(frozen=True)
class Example:
    """One input and the texts that may follow it.

    Attributes:
        context: the linearized input, without end-of-document token.
        references: the targets, spaced as in the data.
        group: a part of the test set that is scored by itself as well: "seen" and "unseen"
            categories of WebNLG; "" where the task has none.
        key: what the data call it, for files of the task's official scripts; "" where nothing.
    """

    context: str
    references: tuple[str, ...]
    group: str = ""
    key: str = ""


@dataclass(frozen=True)
class OfficialForm:
    """Texts as a task's official scripts compare them, where that is not as they are in the data.

    Attributes:
        output: brings a system's output into the form.
        reference: brings a reference of the data into the form.
        most: references of an input that the scripts read.
        applies_to: whether the scripts bring outputs into the form when these are the references,
            read from files that have it.
    """

    output: Callable[[str], str]
    reference: Callable[[str], str]
    most: int
    applies_to: Callable[[Sequence[Sequence[str]]], bool] = lambda references: False


@dataclass(frozen=True)
class Task:
    """A fine-tuning task.

    Attributes:
        title: its name and source, for people.
        files: split -> patterns of its file's name as it is published, the better ones first.
        read: the examples of a file, in its order. Raises ValueError with the file and the line or
            record for what is malformed.
        metrics: names in megatron_spdf/evaluation/metrics, in the order in which they are printed.
        form: of the texts that are scored; None: as they are.
        labels: texts of which a completion must be one, in the order of the data's numbers; (): any
            text will do.
        loses: end of the context that is cut off where it does not fit the model's window. Of news
            it is the end, since they begin with what matters.
        decoding: settings of decoding, in place of those of E2E: {"beams": 1}.
        submission: (examples, outputs) -> name and content of the file that the task's official
            scripts or server read; None: none.
    """

    title: str
    files: dict[str, tuple[str, ...]]
    read: Callable[[Path], list[Example]]
    metrics: tuple[str, ...]
    form: OfficialForm | None = None
    labels: tuple[str, ...] = ()
    loses: Loses = "beginning"
    decoding: Mapping[str, int | float] = field(default_factory=dict)
    submission: Callable[[Sequence[Example], Sequence[str]], tuple[str, str]] | None = None

    @property
    def suffixes(self) -> set[str]:
        """Endings of the names of its files: ".json". What ends in ".txt" may be anything."""
        names = {name for names in self.files.values() for name in names}
        return {Path(name).suffix for name in names} - {"", ".txt"}


TASKS: Registry[Task] = Registry("task", "megatron_spdf.data.finetuning.tasks")


def render_tasks() -> str:
    """A line for each task: its name in recipes and its title."""
    names = TASKS.names()
    width = max(map(len, names))
    return "\n".join(f"  {name:<{width}} {TASKS.get(name).title}" for name in names)


def load_examples(name: str, path: Path, split: str) -> list[Example]:
    """The examples of a split, in the order of the data.

    Args:
        name: of a task.
        path: the split's file, or the directory that holds the splits under the names they are
            published with.
        split: "train", "validation" or "test". In train and validation every example has a
            reference; in test it may have none.

    Raises:
        ValueError: the task or split is unknown, a field is missing or malformed (with its file and
            its line or record), or the split is empty.
        FileNotFoundError: nothing is at `path`, or the directory has no file of this split.
    """
    task = TASKS.get(name)
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    file = find_file(Path(path), task.files[split], name, split)
    examples = task.read(file)
    if split != "test":
        examples = [example for example in examples if example.references]
    if not examples:
        raise ValueError(f"{file} has no "
                         f"{'example' if split == 'test' else 'example with a reference'}; the "
                         f"{split} split of {name} must not be empty")
    return examples


def require_splits(name: str, path: Path) -> None:
    """Raises a ValueError unless `path` is a directory whose training and validation split are two
    files, a FileNotFoundError where one is missing."""
    if path.is_file():
        raise ValueError(f"data.path={path} is a file, and a run needs a training and a validation "
                         f"split; name the directory that holds the splits of {name}")
    found = [find_file(path, TASKS.get(name).files[split], name, split)
             for split in ("train", "validation")]
    if same_file(found):
        raise ValueError(f"data.path={path}: {found[0].name} and {found[1].name} are one file, and "
                         "a validation split must not be the training data")


def shortened(context: list[int], room: int, loses: Loses) -> list[int]:
    """The token ids of a context without those at one end for which there is no room."""
    return context[:room] if loses == "end" else context[max(0, len(context) - room) :]


def training_pairs(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Every (context, reference)."""
    return [(example.context, reference) for example in examples
            for reference in example.references]


@functools.cache
def count_pairs(name: str, path: str, split: str = "validation") -> int:
    """Counts the training pairs of a data set that has all that is trained on, once for many runs.

    Args:
        split: another that must be readable.

    Raises:
        ValueError, FileNotFoundError: a split is missing or malformed.
    """
    require_splits(name, Path(path))
    for needed in dict.fromkeys(("validation", split)):
        load_examples(name, Path(path), needed)
    return len(training_pairs(load_examples(name, Path(path), "train")))
