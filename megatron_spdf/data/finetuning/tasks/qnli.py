"""QNLI (Rajpurkar et al. 2016, Wang et al. 2019): whether a sentence answers a question."""

from __future__ import annotations

from megatron_spdf.data.finetuning.glue import Columns, glue_task
from megatron_spdf.data.finetuning.task import TASKS

TASKS.register("qnli", glue_task(
    "QNLI (Rajpurkar et al. 2016)",
    Columns("qnli", {"question": "question", "sentence": "sentence"}, "label",
            {name: name for name in ("entailment", "not_entailment")}),
    metrics=("accuracy",), submission="QNLI.tsv"))
