"""SQuAD 1.1 (Rajpurkar et al. 2016): JSON; a passage and a question to an answer, written out.

The question comes last, so that a passage which is too long loses its beginning, and the question
stays. The official test set is not published; the development set is the validation split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_spdf.data.finetuning.files import checked_text, json_file, list_of, require_whole
from megatron_spdf.data.finetuning.task import TASKS, Example, Task


def read(path: Path) -> list[Example]:
    """One example per question, with its different answers."""
    content = json_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__} instead of an object with the field "
                         "'data'")
    return [example for number, article in enumerate(list_of(str(path), content, "data"), start=1)
            for example in _article(f"{path}, article {number}", article)]


def _article(where: str, article: Any) -> Iterator[Example]:
    paragraphs = list_of(where, _object(where, article, "paragraphs"), "paragraphs")
    for number, paragraph in enumerate(paragraphs, start=1):
        at = f"{where}, paragraph {number}"
        _object(at, paragraph, "context and qas")
        passage = checked_text(at, "context", paragraph.get("context"))
        for question in list_of(at, paragraph, "qas"):
            yield _example(at, passage, question)


def _example(at: str, passage: str, question: Any) -> Example:
    _object(at, question, "id, question and answers")
    key = checked_text(at, "id", question.get("id"))
    where = f"{at}, question {key}"
    if question.get("is_impossible"):
        raise ValueError(f"{where} has no answer: this is SQuAD 2.0, and answers are written and "
                         "scored here as in SQuAD 1.1; take train-v1.1.json and dev-v1.1.json")
    asked = question.get("question")
    if not isinstance(asked, str):
        raise ValueError(f"{where}: field 'question' must be a text; it is {asked!r:.80}")
    require_whole(where, "question", asked)
    answers = list_of(where, question, "answers") if "answers" in question else []
    texts = [checked_text(where, "text", _object(where, answer, "text").get("text"))
             for answer in answers]
    return Example(f"context: {passage.strip()} question: {asked.strip()}",
                   tuple(dict.fromkeys(texts)), key=key)


def _object(where: str, value: Any, fields: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: an object must have {fields}; it is {value!r:.80}")
    return value


def submitted(examples: Sequence[Example], outputs: Sequence[str]) -> tuple[str, str]:
    """The answers as the official evaluate-v1.1.py reads them: {id: text}."""
    answers = {example.key: output for example, output in zip(examples, outputs, strict=True)}
    return "predictions.json", json.dumps(answers, ensure_ascii=False, indent=0) + "\n"


TASKS.register("squad", Task(
    title="SQuAD 1.1 (Rajpurkar et al. 2016)",
    files={"train": ("train-v1.1.json", "train.json"),
           "validation": ("dev-v1.1.json", "dev.json", "validation.json"),
           "test": ("test-v1.1.json", "test.json")},
    read=read, metrics=("squad",),
    decoding={"beams": 4, "no_repeat_ngram": 0, "max_new_tokens": 48}, submission=submitted))
