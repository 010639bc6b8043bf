"""Text of tasks: inputs written out as text, and words as official scripts separate them."""

from __future__ import annotations

import re

from megatron_spdf.data.finetuning.task import Example


def linearize(triples: list[tuple[str, str, str]]) -> str:
    """`subject : relation : object | ...`, as LoRA's NLG examples have it."""
    return " | ".join(" : ".join(triple) for triple in triples)


def merge(examples: list[Example]) -> list[Example]:
    """One example per context, in order of first appearance, with the references of all."""
    references: dict[str, tuple[str, ...]] = {}
    for example in examples:
        references[example.context] = references.get(example.context, ()) + example.references
    return [Example(context, found) for context, found in references.items()]


def split_words(text: str) -> str:
    """Every character that belongs to no word stands alone, one blank between all."""
    return " ".join(" ".join(re.split(r"(\W)", text)).split())
