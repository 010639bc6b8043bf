"""Predictions and references in the forms in which the tasks' official scripts have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spdf.data.finetuning.tasks import Example, load_examples
from megatron_spdf.evaluation.normalize_text import (
    REFERENCES,
    dart_text,
    webnlg_output,
    webnlg_reference,
)

TOKENIZED = ("webnlg", "dart")  # tasks whose official scripts compare tokenized, lower-cased texts
_DATA = (".csv", ".json", ".jsonl", ".xml")


@dataclass(frozen=True)
class References:
    """What predictions are held against.

    Attributes:
        texts: of every input its references, one or more.
        groups: of every input the part of the test set it belongs to, or "".
        tokenized: the texts are in the form of the official reference files, not as in the data.
    """

    texts: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    tokenized: bool = False


def references_of(examples: Sequence[Example]) -> References:
    """Those of a task's data."""
    return References(tuple(e.references for e in examples), tuple(e.group for e in examples))


def read_predictions(path: Path) -> list[str]:
    """One per line, outer blanks removed.

    Raises:
        ValueError: it is no UTF-8 text.
        FileNotFoundError: nothing is at `path`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []


def read_references(task: str, paths: Sequence[Path], split: str = "test") -> References:
    """References from the task's data (a file, or the directory of the splits), or from text files.

    Text files are one with a blank line after the references of each input, or without blank lines
    and one reference an input; or several whose lines belong together, where a blank line is a
    missing reference. Several may be named by what their names begin with: `reference` for
    reference0, reference1, ...

    Raises:
        ValueError: they cannot be read, have different numbers of lines, or an input has no
            reference.
        FileNotFoundError: nothing is there.
    """
    if len(paths) == 1 and (paths[0].is_dir() or paths[0].suffix.lower() in _DATA):
        found = references_of(load_examples(task, paths[0], split))
    else:
        texts = _parallel(paths) if len(paths) > 1 else _one_or_many(paths[0])
        found = References(texts, ("",) * len(texts), tokenized=task in TOKENIZED)
    for number, texts in enumerate(found.texts, start=1):
        if not texts:
            raise ValueError(f"{paths[0]}: input {number} has no reference; scoring needs at least "
                             "one for each")
    return found


def _one_or_many(path: Path) -> tuple[tuple[str, ...], ...]:
    numbered = sorted(path.parent.glob(f"{path.name}[0-9]*"), key=lambda p: (len(p.name), p.name))
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
    columns = [read_predictions(path) for path in paths]
    counts = {path.name: len(column) for path, column in zip(paths, columns, strict=True)}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the reference files have different numbers of lines: {counts}")
    return tuple(tuple(filter(None, texts)) for texts in zip(*columns, strict=True))


def in_official_form(task: str, predictions: Sequence[str],
                     references: References) -> tuple[list[str], References]:
    """Both as the official scripts of WebNLG and DART compare them.

    Predictions against data are tokenized as the references are. Against reference files those of
    DART are taken as they are; those of WebNLG are tokenized, as its script does, if the files are
    in ASCII, as its script writes them.
    """
    output, reference = (webnlg_output,
                         webnlg_reference) if task == "webnlg" else (dart_text, dart_text)
    if not references.tokenized:
        texts = tuple(tuple(map(reference, texts[:REFERENCES])) for texts in references.texts)
        return list(map(output, predictions)), References(texts, references.groups, tokenized=True)
    if task == "webnlg" and all(text.isascii() for texts in references.texts for text in texts):
        return list(map(output, predictions)), references
    return list(predictions), references


def write_official(task: str, predictions: Sequence[str], references: References,
                   directory: Path) -> None:
    """predictions.txt, one per line, and references as the official scripts read them.

    WebNLG and DART: reference0, reference1, ... and predictions.tokenized.txt in the form of their
    scripts. Others: references.txt, a blank line after the references of each input.
    """
    _write_lines(directory / "predictions.txt", predictions)
    if task not in TOKENIZED:
        blocks = ("\n".join(map(_one_line, texts)) + "\n" for texts in references.texts)
        _write_lines(directory / "references.txt", blocks, joined=True)
        return
    outputs, official = in_official_form(task, predictions, references)
    _write_lines(directory / "predictions.tokenized.txt", outputs)
    for i in range(max(map(len, official.texts))):
        _write_lines(directory / f"reference{i}",
                     [texts[i] if i < len(texts) else "" for texts in official.texts])


def _write_lines(path: Path, lines, joined: bool = False) -> None:
    path.write_text("".join(f"{line if joined else _one_line(line)}\n" for line in lines),
                    encoding="utf-8")


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
