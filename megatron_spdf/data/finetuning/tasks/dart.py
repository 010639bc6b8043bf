"""DART v1.1.1 (Nan et al., 2021): JSON, a list of {"tripleset": [[s, r, o], ...], "annotations":
[{"text"}, ...]}.

Relations are lower-cased, as in LoRA's NLG examples. A blank text, of which the test set has one,
is no reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_spdf.data.finetuning.files import json_file, list_of, require_whole, text_of
from megatron_spdf.data.finetuning.task import TASKS, Example, OfficialForm, Task
from megatron_spdf.data.finetuning.texts import linearize, split_words


def read(path: Path) -> list[Example]:
    """One example per record, as in the official reference files."""
    content = json_file(path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: a {type(content).__name__} instead of a list of records")
    return [_example(f"{path}, record {number}", record) for number,
            record in enumerate(content, start=1)]


def _example(where: str, record: Any) -> Example:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record must have tripleset and annotations; it is "
                         f"{record!r:.80}")
    triples = [_triple(where, triple) for triple in list_of(where, record, "tripleset")]
    if not triples:
        raise ValueError(f"{where}: field 'tripleset' is empty")
    texts = []
    for annotation in list_of(where, record, "annotations"):
        if not isinstance(annotation, dict):
            raise ValueError(f"{where}: an annotation must have the field 'text'; it is "
                             f"{annotation!r:.80}")
        if annotation.get("text") != "":
            texts.append(text_of(where, annotation, "text"))
    return Example(linearize(triples), tuple(texts))


def _triple(where: str, triple: Any) -> tuple[str, str, str]:
    if not (isinstance(triple, list) and len(triple) == 3
            and all(isinstance(part, str) for part in triple)):
        raise ValueError(f"{where}: a triple must be three texts; it is {triple!r:.80}")
    for part in triple:
        require_whole(where, "tripleset", part)
    return triple[0], triple[1].lower(), triple[2]


def official(text: str) -> str:
    """Lower-cased words of an output or a reference, which keep their alphabet."""
    return split_words(text.lower())


TASKS.register("dart", Task(
    title="DART v1.1.1 (Nan et al., 2021)",
    files={"train": ("dart-*-full-train*.json", "train.json"),
           "validation": ("dart-*-full-dev*.json", "dev.json"),
           "test": ("dart-*-full-test*.json", "test.json")},
    read=read, metrics=("bleu_tokenized", "meteor", "ter"),
    form=OfficialForm(official, official, most=3)))
