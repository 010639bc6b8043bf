"""The demo's synthetic table-to-text set: right sentences, splits that share no record, the same
every time."""

from __future__ import annotations

import json

from demo_parts.functions import RIGHT, realize, write_functions

from megatron_spdf.data.finetuning.task import SPLITS, load_examples


def records(path):
    for line in path.read_text().splitlines():
        example = json.loads(line)
        record = dict(slot.split(" : ") for slot in example["context"].split(" | "))
        completion = example["completion"]
        yield record, completion if isinstance(completion, list) else [completion]


def test_sentences_say_all_of_a_record_and_nothing_else(tmp_path):
    lines = write_functions(tmp_path / "set")
    for split in SPLITS:
        found = list(records(tmp_path / "set" / f"{split}.jsonl"))
        assert len(found) == lines[split]
        for record, sentences in found:
            for sentence in sentences:
                assert all(value in sentence for value in record.values()), (record, sentence)
                assert all((f" {slot}" in sentence) == (slot in record)
                           for slot in ("returns", "raises"))


def test_splits_share_no_record(tmp_path):
    write_functions(tmp_path / "set")
    contexts = {split: {e.context for e in load_examples("jsonl", tmp_path / "set", split)}
                for split in SPLITS}
    assert sum(map(len, contexts.values())) == len(set.union(*contexts.values()))


def test_several_sentences_are_right(tmp_path):
    write_functions(tmp_path / "set")
    for example in load_examples("jsonl", tmp_path / "set", "test"):
        assert len(set(example.references)) == RIGHT


def test_it_is_the_same_every_time(tmp_path):
    write_functions(tmp_path / "one")
    write_functions(tmp_path / "two")
    for split in SPLITS:
        assert (tmp_path / "one" / f"{split}.jsonl").read_bytes() == (
            tmp_path / "two" / f"{split}.jsonl"
        ).read_bytes()
    (record, sentences), *_ = records(tmp_path / "one" / "test.jsonl")
    assert set(sentences) <= set(realize(record))
