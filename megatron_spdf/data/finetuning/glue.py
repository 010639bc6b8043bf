"""Tasks of GLUE (Wang et al. 2019): tab-separated files, and a label that is written out.

Inputs and labels are texts as T5 has them (Raffel et al. 2020, appendix D), a name before each
sentence:

    rte sentence1: ... sentence2: ...  ->  entailment
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spdf.data.finetuning.files import require_whole
from megatron_spdf.data.finetuning.task import Example, Task
from megatron_spdf.text import in_one_line

logger = logging.getLogger(__name__)

FILES = {"train": ("train.tsv",), "validation": ("dev.tsv",), "test": ("test.tsv",)}
NO_LABEL = ("", "-1", "-")  # in its place where a set has none
KEYS = ("index", "id")  # columns that number the inputs of a test set
DECODING = {"beams": 1, "no_repeat_ngram": 0, "max_new_tokens": 16}


@dataclass(frozen=True)
class Columns:
    """What a task takes from a row.

    Attributes:
        name: of the task, the first word of an input.
        sentences: name of a sentence in the input -> column.
        label: column of the label, which test sets lack.
        labels: label in the files -> text; {}: a number, whose text is the number.
        header: columns of files that begin with a row; (): all have a header.
        may_break: a labeled row of another number of fields is left out, and said.
    """

    name: str
    sentences: Mapping[str, str]
    label: str
    labels: Mapping[str, str]
    header: tuple[str, ...] = ()
    may_break: bool = False

    def read(self, path: Path) -> list[Example]:
        """One example per row.

        Raises:
            ValueError: a column is missing, a row has another number of fields, or a label or a
                sentence is none; with the file and the line.
        """
        return [Example(self._context(where, row), self._label(where, row),
                        key=next((row[key] for key in KEYS if key in row), ""))
                for where, row in self._rows(path)]

    def _rows(self, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
        rows = tsv_rows(path)
        first = next(rows, (f"{path}, line 1", []))
        header = tuple(name.strip().lower() for name in first[1])
        if self.header and len(header) == len(self.header):
            header, rows = self.header, iter([first, *rows])
        if missing := [name for name in self.sentences.values() if name not in header]:
            raise ValueError(f"{first[0]}: no column {', '.join(missing)}; the header is "
                             f"{list(header)}")
        broken = []
        for where, row in rows:
            if len(row) == len(header):
                yield where, dict(zip(header, row, strict=True))
            elif not (self.may_break and self.label in header):
                raise ValueError(f"{where}: {len(row)} fields where the header has {len(header)}")
            else:
                broken.append(where.rsplit(" ")[-1])
        if broken:
            logger.warning("%s: %d rows are broken in two or more and left out, lines %s", path,
                           len(broken), ", ".join(broken[:8]))

    def _context(self, where: str, row: Mapping[str, str]) -> str:
        texts = {name: row[column].strip() for name, column in self.sentences.items()}
        if not any(texts.values()):
            raise ValueError(f"{where}: field {', '.join(map(repr, self.sentences.values()))} must "
                             "be a text that is not blank")
        for name, text in texts.items():
            require_whole(where, name, text)
        return " ".join([self.name, *(f"{name}: {text}" for name, text in texts.items())])

    def _label(self, where: str, row: Mapping[str, str]) -> tuple[str, ...]:
        said = row.get(self.label, "").strip()
        if said in NO_LABEL:
            return ()
        try:
            return (self.labels[said] if self.labels else number(said),)
        except (KeyError, ValueError):
            known = ", ".join(self.labels) or "a number"
            raise ValueError(f"{where}: field {self.label!r} must be {known}, or "
                             f"{', '.join(NO_LABEL[1:])} for none; it is {said!r:.80}") from None


def tsv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The rows of a tab-separated file, each with its place. A quotation mark is a character like
    any other, and a line ends at LF or CR LF alone.

    Raises:
        ValueError: the file is not UTF-8.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            for line_number, line in enumerate(file, start=1):
                if line := line.removesuffix("\n").removesuffix("\r"):
                    yield f"{path}, line {line_number}", line.split("\t")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error})") from None


def number(text: str) -> str:
    """A decimal number as a model is to write it: 3.8 of 3.800, with one place at least.

    Raises:
        ValueError: the text is no such number.
    """
    digits, point, places = text.partition(".")
    if not (digits.isdecimal() and digits.isascii() and (places or "0").isdecimal()):
        raise ValueError(text)
    return f"{int(digits)}.{places.rstrip('0') or '0'}"


def glue_task(title: str, columns: Columns, metrics: Sequence[str], submission: str,
              files: Mapping[str, tuple[str, ...]] = FILES) -> Task:
    """A task of GLUE.

    Its submission has the first label where an output is none.

    Args:
        title: for people.
        columns: of its files.
        metrics: names, see `Task`.
        submission: name of the file that GLUE's server reads, "RTE.tsv".
        files: see `Task`.
    """
    labels = {text: said for said, text in columns.labels.items()}

    def submitted(examples: Sequence[Example], outputs: Sequence[str]) -> tuple[str, str]:
        fallback = next(iter(labels.values())) if labels else "0.0"
        lines = ["index\tprediction"]
        for place, (example, output) in enumerate(zip(examples, outputs, strict=True)):
            said = (labels.get(output) if labels else _score(output)) or fallback
            lines.append(f"{in_one_line(example.key) or place}\t{said}")
        return submission, "".join(f"{line}\n" for line in lines)

    return Task(title=f"{title}, of GLUE", files=dict(files), read=columns.read,
                metrics=tuple(metrics), labels=tuple(columns.labels.values()), decoding=DECODING,
                submission=submitted)


def _score(output: str) -> str | None:
    """A similarity within the bounds of GLUE's; None: the output is no number."""
    try:
        return str(min(float(number(output)), 5.0))
    except ValueError:
        return None
