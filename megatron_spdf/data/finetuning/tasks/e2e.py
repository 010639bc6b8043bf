"""E2E NLG (Novikova et al., 2017): CSV with columns mr and ref, one reference a row.

    name[Blue Spice], eatType[coffee shop]  ->  name : Blue Spice | eatType : coffee shop
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_spdf.data.finetuning.files import csv_rows, text_of
from megatron_spdf.data.finetuning.task import TASKS, Example, Task
from megatron_spdf.data.finetuning.texts import merge

_SLOT = r"([^\[\],]+)\[([^\[\]]*)\]"
_SLOTS = re.compile(rf"{_SLOT}(?:, *{_SLOT})*")


def read(path: Path) -> list[Example]:
    """One example per meaning representation."""
    examples = []
    for where, row in csv_rows(path, ("mr",), ("ref",)):
        references = (text_of(where, row, "ref"),) if "ref" in row else ()
        examples.append(Example(linearise_slots(where, text_of(where, row, "mr")), references))
    return merge(examples)


def linearise_slots(where: str, meaning: str) -> str:
    """`slot : value | ...` of `slot[value], ...`, with slots in the order of the data.

    Raises:
        ValueError: `meaning` has another form; `where` begins the message.
    """
    if not _SLOTS.fullmatch(meaning.strip()):
        raise ValueError(f"{where}: the meaning representation {meaning!r:.120} is not of the form "
                         "slot[value], slot[value], ...")
    return " | ".join(f"{slot.strip()} : {value.strip()}" for slot,
                      value in re.findall(_SLOT, meaning))


TASKS.register("e2e", Task(
    title="E2E NLG (Novikova et al., 2017)",
    files={"train": ("trainset.csv", "train.csv"), "validation": ("devset.csv", "dev.csv"),
           "test": ("testset_w_refs.csv", "test.csv", "testset.csv")},
    read=read, metrics=("bleu_13a", "nist", "captions")))
