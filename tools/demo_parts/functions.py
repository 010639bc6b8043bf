"""A synthetic table-to-text set: records about functions that do not exist, and sentences that say
what they hold.

A small grammar makes it, so it shows the mechanics of fine-tuning and nothing about language. As in
E2E (Novikova et al. 2017), a record is a list of `slot : value` in which slots may be missing,
several sentences are right for it, and no record of one split is in another.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from megatron_spdf.files import write_file

VERBS = ("open", "read", "write", "parse", "copy", "find", "join", "split", "load", "dump",
         "check", "format")
NOUNS = ("file", "line", "path", "header", "token", "message", "record", "name", "table", "date",
         "tree", "stream")
MODULES = ("os", "json", "email", "http", "csv", "socket", "ast", "time", "string", "logging")
THINGS = ("a string", "a list", "an integer", "a dictionary", "a tuple", "a bytes object",
          "an iterator", "a set")
ERRORS = ("ValueError", "TypeError", "OSError", "KeyError", "IndexError", "RuntimeError")
SPLITS = {"train": 800, "validation": 40, "test": 60}  # records
RIGHT = 3  # sentences for a record of validation and test; training has one line for each of two
TRAINING_LINES = 2 * SPLITS["train"]

Record = dict[str, str]


def write_functions(directory: Path, seed: int = 1234) -> dict[str, int]:
    """train.jsonl, validation.jsonl and test.jsonl; returns the lines of each."""
    directory.mkdir(parents=True)
    draw, records = random.Random(seed), distinct_records(random.Random(seed + 1))
    lines = {}
    for split, count in SPLITS.items():
        examples = []
        for record in (next(records) for _ in range(count)):
            sentences = draw.sample(list(realize(record)), RIGHT)
            if split == "train":
                examples += [{"context": linearize(record), "completion": text}
                             for text in sentences[:2]]
            else:
                examples.append({"context": linearize(record), "completion": sentences})
        write_file(directory / f"{split}.jsonl", "".join(json.dumps(e) + "\n" for e in examples))
        lines[split] = len(examples)
    return lines


def distinct_records(draw: random.Random) -> Iterator[Record]:
    """Records, each once."""
    seen = set()
    while True:
        record = {"name": f"{draw.choice(VERBS)}_{draw.choice(NOUNS)}",
                  "module": draw.choice(MODULES)}
        for slot, values in (("takes", THINGS), ("returns", THINGS), ("raises", ERRORS)):
            if draw.random() < 0.7:
                record[slot] = draw.choice(values)
        if linearize(record) not in seen:
            seen.add(linearize(record))
            yield record


def linearize(record: Record) -> str:
    return " | ".join(f"{slot} : {value}" for slot, value in record.items())


def realize(record: Record) -> Iterator[str]:
    """Sentences that say all of a record and nothing else."""
    name, module = record["name"], record["module"]
    takes, returns, raises = (record.get(slot) for slot in ("takes", "returns", "raises"))
    does = [f"{verb} {value}" for verb,
            value in (("takes", takes), ("returns", returns), ("raises", raises)) if value]
    does = does or ["takes nothing"]
    yield f"The function {name} of the module {module} {_listed(does)}."
    yield f"{module} has a function {name}, which {_listed(does)}."
    yield f"In {module}, {name} {_listed(does)}."
    yield f"{name} is a function of {module}. It {_listed(does)}."


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
