"""Samples of text: what runs answered on a task, and what else was kept of what they wrote."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_spdf.files import leads_out
from megatron_spdf.records.values import read_bytes
from megatron_spdf.reports.document import bullets, escape, heading, key, paragraph
from megatron_spdf.reports.pens import Pen
from megatron_spdf.reports.runs import Logged
from megatron_spdf.text import lines_of

# Line by line what an evaluation asked and what was answered, as tools/evaluate.py writes it.
ANSWERS, INPUTS = "evaluation/*/predictions.txt", "inputs.txt"
TEXTS = "samples/*.txt"  # of a run directory, whoever wrote them
SHOWN = 4  # inputs of a task, evenly spread over them
LONGEST = 800  # characters of a text that are shown
MOST_BYTES = 1 << 27

# Text of what is shown beside its name, and the pen of the run that wrote it.
Row = tuple[str, Pen | None, str]


def samples_section(runs: Sequence[Logged], pens: Mapping[Path, Pen]) -> list[str]:
    """Section of a page; nothing where no run has kept a text. What cannot be read of a run's
    directory, or lies elsewhere, is left out with a line."""
    notes: list[str] = []
    parts = [*_answers(runs, pens, notes), *_texts(runs, pens, notes)]
    if notes:
        parts.append(bullets(notes))
    if not parts:
        return []
    note = (f"The same {SHOWN} inputs of a task for every run, evenly spread over them, and the "
            "files of samples/ in the directories of the runs. Long texts are cut.")
    return [heading("Samples of text", name="samples"), *parts, paragraph(note, "note")]


def _answers(runs: Sequence[Logged], pens: Mapping[Path, Pen], notes: list[str]) -> list[str]:
    """Evaluations, each with the answers of all runs that were given the same inputs."""
    found: dict[tuple, list[tuple[Logged, list[str]]]] = defaultdict(list)
    for run in runs:
        for file, text in _kept(run, ANSWERS, notes):
            answers, name = _lines(text), file.parent.name
            chosen = spread(len(answers))
            asked = tuple(zip(chosen, *(
                [lines[i] for i in chosen] if len(lines) == len(answers) else [""] * len(chosen)
                for lines in (_inputs(run, name, notes), _references(run, name, notes))),
                strict=True))
            found[name, asked].append((run, [answers[i] for i in chosen]))
    parts = []
    for (name, asked), answered in found.items():
        if asked:
            parts.append(heading(name, 3))
        for place, (number, given, reference) in enumerate(asked):
            beside: list[Row] = [("reference", None, reference)] if reference else []
            parts.append(_sample([(f"input {number + 1:,}", None, given or "not kept"), *beside, *(
                (run.label, pens[run.directory], answers[place]) for run, answers in answered)]))
    return parts


def _kept(run: Logged, pattern: str, notes: list[str]) -> Iterator[tuple[Path, str]]:
    """Files of a run and their texts.

    Args:
        pattern: of their paths in the run's directory.
        notes: get a sentence on each that is left out.
    """
    for file in sorted(run.directory.glob(pattern)):
        if leads_out(run.directory, file):
            notes.append(f"left out: {file} is reached by a link that leads out of its run")
            continue
        try:
            content = read_bytes(file, MOST_BYTES, "move it elsewhere")
        except (OSError, ValueError) as error:
            notes.append(f"left out: {error}")
        else:
            yield file, content.decode("utf-8-sig", "replace")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in lines_of(text)]


def _inputs(run: Logged, name: str, notes: list[str]) -> list[str]:
    return [line for _, text in _kept(run, f"evaluation/{glob.escape(name)}/{INPUTS}", notes)
            for line in _lines(text)]


def _references(run: Logged, name: str, notes: list[str]) -> list[str]:
    """First reference of each input, in the task's official form if it has one."""
    place = f"evaluation/{glob.escape(name)}"
    for _, text in _kept(run, f"{place}/reference0", notes):
        return _lines(text)
    return [group.partition("\n")[0].strip()
            for _, text in _kept(run, f"{place}/references.txt", notes)
            for group in text.split("\n\n")[:-1]]


def spread(count: int) -> list[int]:
    """Numbers of SHOWN of so many things, evenly spread, or of all of them."""
    if count <= SHOWN:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * SHOWN) for i in range(SHOWN)]


def _texts(runs: Sequence[Logged], pens: Mapping[Path, Pen], notes: list[str]) -> list[str]:
    """Files of samples, each name with those of all runs that have it."""
    found: dict[str, list[Row]] = defaultdict(list)
    for run in runs:
        for file, text in _kept(run, TEXTS, notes):
            found[file.stem].append((run.label, pens[run.directory], text.strip()))
    return [part for name, rows in sorted(found.items())
            for part in (heading(name, 3), _sample(rows))]


def _sample(rows: Sequence[Row]) -> str:
    """List of texts about one thing."""
    items = "".join(f"<dt>{key(pen) if pen else ''}{escape(label)}</dt><dd>{escape(_cut(text))}"
                    "</dd>" for label, pen, text in rows)
    return f'<dl class="sample">{items}</dl>'


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()} ..."
