"""Settings of decoding are those that docs/tasks.md gives for each task."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_spdf.data.finetuning.task import TASKS
from megatron_spdf.evaluation.decoding import DecodingSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"
GLUE = {"sst2", "cola", "mrpc", "qqp", "stsb", "mnli", "mnli_mismatched", "qnli", "rte", "wnli"}


def test_every_task_is_decoded_as_the_page_says():
    rows = re.findall(r"^\| `?(\w+)`? \| (\d+) \| (\d+\.\d+) \| (\d+) \| (\d+) \|$",
                      PAGE.read_text(), re.M)
    said = {name: (int(beams), float(penalty), int(ngram), int(tokens))
            for name, beams, penalty, ngram, tokens in rows}
    assert said.keys() == {"GLUE", "squad", "cnn_dailymail", "others"}
    for name in TASKS.names():
        task = TASKS.get(name)
        if task.__class__.__module__.startswith("megatron_spdf."):
            found = DecodingSettings(**task.decoding)
            wanted = said["GLUE" if name in GLUE else name if name in said else "others"]
            assert (found.beams, found.length_penalty, found.no_repeat_ngram,
                    found.max_new_tokens) == wanted, name
