"""Writes the results of an evaluation: scores, settings and versions, predictions and
references."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_spdf.data.finetuning.task import TASKS, Example
from megatron_spdf.evaluation.references import references_of, write_official
from megatron_spdf.evaluation.scores import Scores
from megatron_spdf.files import write_file, write_json
from megatron_spdf.text import in_one_line
from megatron_spdf.version import __version__

SCORES = "scores.json"
_LIBRARIES = ("torch", "transformers", "sacrebleu", "pycocoevalcap", "rouge-score", "Unidecode")


def describe(task: str, split: str | None, scores: Scores, libraries: Sequence[str] = _LIBRARIES,
             **facts: Any) -> dict[str, Any]:
    """Content of scores.json.

    Args:
        task, split: evaluated; a task of which all is evaluated has no split.
        scores: the figures, and how they came about.
        libraries: whose versions they depend on.
        facts: more entries, such as the settings of decoding.
    """
    return {"task": task, **({} if split is None else {"split": split}), **facts,
            "scores": scores.values,
            "missing": scores.missing,
            **({"without_reference": scores.left_out} if scores.left_out else {}),
            "signatures": scores.signatures,
            "versions": {"megatron_spdf": __version__,
                         **{name: _version(name) for name in libraries}},
            "scored": datetime.now(UTC).isoformat(timespec="seconds")}


def _version(library: str) -> str | None:
    """None where it is not installed: metrics that need it are missing, and say so."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def write_scores(output: Path, description: dict[str, Any]) -> None:
    """Writes scores.json alone."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / SCORES, description)


def write_texts(output: Path, task: str, predictions: Sequence[str],
                examples: Sequence[Example]) -> None:
    """Writes inputs and predictions, line by line, references in the official form, and the file
    that the task's official scripts read, if there is one; scores of others are removed."""
    output.mkdir(parents=True, exist_ok=True)
    (output / SCORES).unlink(missing_ok=True)  # no old scores may lie beside new predictions
    known = TASKS.get(task)
    write_file(output / "inputs.txt",
               "".join(f"{in_one_line(example.context)}\n" for example in examples))
    write_official(known, predictions, references_of(examples), output)
    if known.submission:
        name, content = known.submission(examples, predictions)
        write_file(output / name, content)
