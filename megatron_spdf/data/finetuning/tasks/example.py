"""What every task gives."""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One input and the texts that may follow it.

    Attributes:
        context: the linearized input, without end-of-document token.
        references: the targets, spaced as in the data.
        group: a part of the test set that is scored by itself as well: "seen" and "unseen"
            categories of WebNLG; "" where the task has none.
    """

    context: str
    references: tuple[str, ...]
    group: str = ""


def linearize(triples: list[tuple[str, str, str]]) -> str:
    """`subject : relation : object | ...`, as LoRA's NLG examples have it."""
    return " | ".join(" : ".join(triple) for triple in triples)


def merge(examples: list[Example]) -> list[Example]:
    """One example per context, in order of first appearance, with the references of all."""
    references: dict[str, tuple[str, ...]] = {}
    for example in examples:
        references[example.context] = references.get(example.context, ()) + example.references
    return [Example(context, found) for context, found in references.items()]
