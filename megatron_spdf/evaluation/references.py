"""Predictions and references, in the forms of the tasks' official scripts."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_spdf.data.finetuning.task import TASKS, Example, Task, load_examples
from megatron_spdf.files import write_file
from megatron_spdf.paths import same_file
from megatron_spdf.records.json_reader import parse_json
from megatron_spdf.text import in_one_line, lines_of


@dataclass(frozen=True)
class References:
    """References of predictions.

    Attributes:
        texts: references of every input, one or more each.
        groups: part of the test set of every input, or "".
        official: the texts are in the form of the official reference files, not as in the data.
        labels: texts of which an output must be one; (): any text will do.
    """

    texts: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    official: bool = False
    labels: tuple[str, ...] = ()

    def of(self, inputs: Sequence[int]) -> References:
        """References of some inputs."""
        return replace(self, texts=tuple(self.texts[i] for i in inputs),
                       groups=tuple(self.groups[i] for i in inputs))


def references_of(examples: Sequence[Example]) -> References:
    """References in a task's data."""
    return References(tuple(e.references for e in examples), tuple(e.group for e in examples))


def read_predictions(path: Path) -> list[str]:
    """Reads predictions, one per line, with outer blanks removed. A line ends at LF or CR LF.

    Raises:
        ValueError: the file is not UTF-8 text, or holds records of JSON.
        FileNotFoundError: nothing is at `path`.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    lines = [line.strip() for line in lines_of(text)]
    if any(lines) and all(_is_record(line) for line in lines if line):
        raise ValueError(f"{path} holds JSON objects, and predictions are text, one per line; "
                         "write the texts alone, as `jq -r .KEY` does")
    return lines


def _is_record(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def read_references(task: str, paths: Sequence[Path], split: str = "test") -> References:
    """Reads references from the task's data (a file, or the directory of the splits), or from text
    files.

    A single text file has a blank line after the references of each input, or one reference per
    line. Several text files have the references of an input in the same line, where a blank line is
    a missing one. They may be named by the beginning of their names: `reference` for reference0,
    reference1, ...

    Args:
        task: name of the task.
        paths: one or more files, or a directory.
        split: of the task's data.

    Raises:
        ValueError: files cannot be read, have different numbers of lines, are named twice, or have
            no reference;
            an input of a text file has none.
        FileNotFoundError: nothing is at a path.
    """
    known, first = TASKS.get(task), paths[0]
    if len(paths) == 1 and (first.is_dir() or first.suffix.lower() in known.suffixes):
        found = references_of(load_examples(task, first, split))
    else:
        texts = _parallel(paths) if len(paths) > 1 else _one_or_many(first)
        found = References(texts, ("",) * len(texts), official=known.form is not None)
        for number, texts in enumerate(found.texts, start=1):
            if not texts:
                raise ValueError(f"{first}: input {number} has no reference; scoring needs at "
                                 "least one for each")
    if not any(found.texts):
        raise ValueError(f"{first} has no reference at all; name the file that has them, such as "
                         f"{known.files[split][0]}")
    return found


def _one_or_many(path: Path) -> tuple[tuple[str, ...], ...]:
    numbered = sorted(path.parent.glob(f"{glob.escape(path.name)}[0-9]*"),
                      key=lambda p: (len(p.name), p.name))
    if not path.exists() and numbered:
        return _parallel(numbered)
    groups: list[list[str]] = [[]]
    lines = read_predictions(path)
    while lines and not lines[-1]:
        lines.pop()
    for line in lines:
        groups[-1].append(line) if line else groups.append([])
    if len(groups) == 1:
        return tuple((line,) for line in lines)
    return tuple(map(tuple, groups))


def _parallel(paths: Sequence[Path]) -> tuple[tuple[str, ...], ...]:
    if twice := same_file([*paths]):
        raise ValueError(f"the references {' and '.join(map(str, twice))} are one file; name each "
                         "once")
    columns = [read_predictions(path) for path in paths]
    counts = {str(path): len(column) for path, column in zip(paths, columns, strict=True)}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the reference files have different numbers of lines: {counts}")
    return tuple(tuple(filter(None, texts)) for texts in zip(*columns, strict=True))


def in_official_form(task: Task, predictions: Sequence[str],
                     references: References) -> tuple[list[str], References]:
    """Converts predictions and references to the form in which the task's official scripts compare
    them."""
    form = task.form
    if form is None:
        return list(predictions), references
    if references.official:
        ready = not form.applies_to(references.texts)
        return list(predictions if ready else map(form.output, predictions)), references
    texts = tuple(tuple(map(form.reference, texts[: form.most])) for texts in references.texts)
    return list(map(form.output, predictions)), replace(references, texts=texts, official=True)


def write_official(task: Task, predictions: Sequence[str], references: References,
                   directory: Path) -> None:
    """Writes predictions, one per line, and references as the official scripts read them.

    For a task with an official form these are reference0, reference1, ... and
    predictions.official.txt in that form. For others it is references.txt, with a blank line after
    the references of each input.
    """
    _write_lines(directory / "predictions.txt", predictions)
    if task.form is None:
        groups = ("\n".join(map(in_one_line, texts)) + "\n" for texts in references.texts)
        _write_lines(directory / "references.txt", groups, joined=True)
        return
    outputs, official = in_official_form(task, predictions, references)
    _write_lines(directory / "predictions.official.txt", outputs)
    for i in range(max(map(len, official.texts))):
        _write_lines(directory / f"reference{i}",
                     [texts[i] if i < len(texts) else "" for texts in official.texts])


def _write_lines(path: Path, lines, joined: bool = False) -> None:
    write_file(path, "".join(f"{line if joined else in_one_line(line)}\n" for line in lines))
